"""Sampling: queries in, R tokens each out, with their log-probs.

The packed queries go through the model once and leave their keys and values in a cache;
then one token a sequence is decoded, R times. Sampling never stops at EOS (N+ detail
23.1): every response has R tokens, and ppo.py decides what counts.

The random numbers are a table computed before the first token: u[b, t] depends on (seed,
episode, t) only. So the same episode gets the same noise in any batch order, in any split
of the batch, and after a resume, and nothing has to be saved.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_fp32, sample_head
from nanorlhf.attention import causal
from nanorlhf.models import Policy
from nanorlhf.packing import pack
from nanorlhf.ppo import last_token
from nanorlhf.tokenizer import Tokenizer


class KVCache:
    """Keys and values of B sequences of different lengths: (L, B, S, Hkv, Dh) each, token j of sequence b in slot j."""

    def __init__(self, policy: Policy, batch: int, slots: int):
        config, weight = policy.config, policy.head_weight
        shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)

    def prefill(self, packed):
        """The `attend` of the packed queries: ordinary causal attention that also leaves k and v in the cache."""
        attend = causal(packed)
        lengths = torch.tensor(packed.lengths, device=packed.tokens.device)
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)  # (n,)
        n = sequence.shape[0]  # without the filling

        def store_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer, sequence, packed.positions[:n]] = k[:n]
            self.v[layer, sequence, packed.positions[:n]] = v[:n]
            return attend(layer, q, k, v)

        return store_and_attend

    def decode(self, positions: Tensor):
        """The `attend` of one new token a sequence at `positions` (B,): it sees its own sequence, itself included."""
        batch = torch.arange(positions.shape[0], device=positions.device)
        slots = torch.arange(self.k.shape[2], device=positions.device)
        visible = (slots <= positions[:, None])[:, None, None, :]  # (B, 1, 1, S)

        def store_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # q (B, H, Dh); k, v (B, Hkv, Dh)
            self.k[layer, batch, positions] = k
            self.v[layer, batch, positions] = v
            keys, values = self.k[layer].transpose(1, 2), self.v[layer].transpose(1, 2)  # (B, Hkv, S, Dh)
            # The H/Hkv query heads that share a key head stand in the place of a query length: no copy of the cache.
            grouped = q.unflatten(1, (keys.shape[1], -1))  # (B, Hkv, H/Hkv, Dh)
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible).flatten(1, 2)  # (B, H, Dh)

        return store_and_attend


def uniforms(seed: int, episodes: list[int], response_length: int) -> Tensor:
    """u[b, t] in [0, 1), (B, R) float64: row b is a counter-based random stream of (seed, episodes[b]) alone."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, episode])).random(response_length) for episode in episodes]
    return torch.from_numpy(np.stack(rows))


def greedy(hidden: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token and its log-prob at temperature 1. (B, D), (V, D) -> (B,) int64, (B,) fp32."""
    logp = torch.log_softmax(linear_fp32(hidden, head_weight), dim=-1)  # (B, V)
    tokens = logp.argmax(dim=-1)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


@torch.no_grad()
def generate(
    policy: Policy,
    queries: list[list[int]],
    response_length: int,
    temperature: float,
    seed: int = 0,
    episodes: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample `response_length` tokens for each query from the whole vocabulary.

    No top-k, no top-p, no stop at EOS (trap T16).

    args: queries: B token lists; temperature: 0 is greedy; episodes: B numbers that name the noise (default 0..B-1)
    -> responses (B, R) int64, logprobs (B, R) fp32 at the sampling temperature (at 1 when greedy)
    """
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, expected 0 (greedy) or more")
    device = policy.head_weight.device
    packed = pack(queries, device=device)
    lengths = torch.tensor(packed.lengths, device=device)  # (B,)
    cache = KVCache(policy, batch=len(queries), slots=packed.max_length + response_length)
    u = uniforms(seed, list(range(len(queries))) if episodes is None else episodes, response_length).to(device)

    hidden = policy.model(packed.tokens, packed.positions, cache.prefill(packed))[packed.last_rows()]  # (B, D)
    responses, logprobs = [], []
    steps = torch.arange(response_length, device=device)
    for t in range(response_length):
        if temperature > 0:
            tokens, token_logprobs, _ = sample_head(hidden, policy.head_weight, u, steps[t], temperature)  # (B,) each
        else:
            tokens, token_logprobs = greedy(hidden, policy.head_weight)
        responses.append(tokens)
        logprobs.append(token_logprobs)
        if t + 1 < response_length:
            positions = lengths + t  # where this token stands in its sequence
            hidden = policy.model(tokens, positions, cache.decode(positions))
    return torch.stack(responses, dim=1), torch.stack(logprobs, dim=1)


@dataclass(frozen=True)
class Summary:
    """One generated response, as people read it."""

    text: str  # up to the first EOS, without specials, outer blanks removed
    tokens: int  # up to and with the first EOS, or all R
    has_eos: bool
    # Of those tokens together, nats at the sampling temperature; nan: not asked for. Rounding differs with the batch.
    logprob: float = field(default=float("nan"), compare=False)


def read_responses(tokenizer: Tokenizer, responses: Tensor, logprobs: Tensor | None = None) -> list[Summary]:
    """Cut each response after its first EOS and decode it. responses, logprobs (B, R)."""
    last = last_token(responses, tokenizer.eos_id)  # (B,)
    sums = [float("nan")] * len(responses)
    if logprobs is not None:
        sums = logprobs.cpu().cumsum(dim=1).gather(1, last.cpu()[:, None])[:, 0].tolist()  # in a fixed order
    rows = [row[: end + 1] for row, end in zip(responses.tolist(), last.tolist(), strict=True)]
    return [
        Summary(tokenizer.decode(row).strip(), len(row), row[-1] == tokenizer.eos_id, total)
        for row, total in zip(rows, sums, strict=True)
    ]


def summarise(
    policy: Policy,
    tokenizer: Tokenizer,
    queries: list[list[int]],
    response_length: int,
    temperature: float,
    seed: int = 0,
    batch_size: int = 128,
    progress=lambda batches, what: batches,
) -> list[Summary]:
    """Generate a summary of each query, `batch_size` at a time.

    Batches are cut by length; the noise goes by position in `queries`.
    """
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    summaries: dict[int, Summary] = {}
    for batch in progress(batches, what="generating summaries"):
        batch_queries = [queries[i] for i in batch]
        responses, logprobs = generate(policy, batch_queries, response_length, temperature, seed, episodes=batch)
        summaries |= dict(zip(batch, read_responses(tokenizer, responses, logprobs), strict=True))
    return [summaries[i] for i in range(len(queries))]
