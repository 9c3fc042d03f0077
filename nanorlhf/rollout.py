"""Sampling: queries in, R tokens each out, with their log-probs.

The packed queries go through the model once and leave their keys and values in a cache;
then one token a sequence is decoded, R times (decoder.py). Sampling never stops at EOS (N+
detail 23.1): every response has R tokens, and ppo.py decides what counts.

The random numbers are a table computed before the first token: u[b, t] depends on (seed,
episode, t) only. So the same episode gets the same noise in any batch order, in any split
of the batch, and after a resume, and nothing has to be saved.

With one post's numbers: docs/walk.md, station 5.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanorlhf import parallel
from nanorlhf.data.tokenizer import Tokenizer
from nanorlhf.decoder import decoder_for
from nanorlhf.errors import UserError
from nanorlhf.models import Policy
from nanorlhf.packing import own_rows
from nanorlhf.ppo import last_token


def uniforms(seed: int, episodes: list[int], response_length: int) -> Tensor:
    """u[b, t] in [0, 1), (B, R) float64: row b is a counter-based random stream of (seed, episodes[b]) alone."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, episode])).random(response_length) for episode in episodes]
    return torch.from_numpy(np.stack(rows))


def generate(
    policy: Policy,
    queries: list[list[int]],
    response_length: int,
    temperature: float,
    seed: int = 0,
    episodes: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample `response_length` tokens for each query from the whole vocabulary.

    No top-k, no top-p, no stop at EOS (trap T16). Under torchrun every process must ask: each samples its share of the
    queries, from the same noise as a single one would, and all get all responses.

    args: queries: B token lists; temperature: 0 is greedy; episodes: B numbers that name the noise (default 0..B-1)
    -> responses (B, R) int64, logprobs (B, R) fp32 at the sampling temperature (at 1 when greedy)
    """
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, expected 0 (greedy) or more")
    if not queries or not all(queries):
        raise ValueError("queries: got none or an empty one, expected at least one, and none of them empty")
    u = uniforms(seed, list(range(len(queries))) if episodes is None else episodes, response_length)
    mine = own_rows([len(query) for query in queries])  # all of them, without torchrun
    sampled = _sample(policy, [queries[i] for i in mine], response_length, temperature, u[mine])
    return parallel.whole(sampled, mine, len(queries)) if parallel.on() else sampled


def _sample(
    policy: Policy, queries: list[list[int]], response_length: int, temperature: float, u: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by this process alone; none for no queries. u (B, R): the noise."""
    if not queries:
        none = u.new_zeros(0, response_length, device=policy.head_weight.device)
        return none.long(), none.float()
    longest = max(len(query) for query in queries)
    return decoder_for(policy, len(queries), longest, response_length, temperature).decode(policy, queries, u)


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

    Batches are cut by length; the noise goes by position in `queries`. The longest come first:
    what runs out of memory does so at once, and what was allocated for them serves the others.
    """
    batch_size *= parallel.size()  # `generate` shares a batch out
    order = sorted(range(len(queries)), key=lambda i: -len(queries[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    summaries: dict[int, Summary] = {}
    for batch in progress(batches, what="generating summaries"):
        batch_queries = [queries[i] for i in batch]
        responses, logprobs = generate(policy, batch_queries, response_length, temperature, seed, episodes=batch)
        if not torch.isfinite(logprobs).all():  # the noise then picks tokens that mean nothing
            raise UserError(
                "policy: a log-prob of what it wrote is not finite, expected finite numbers: its weights are damaged "
                "or too large for this dtype; take another checkpoint"
            )
        summaries |= dict(zip(batch, read_responses(tokenizer, responses, logprobs), strict=True))
    return [summaries[i] for i in range(len(queries))]
