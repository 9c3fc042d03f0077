"""The two kinds of model in RLHF, each a Llama trunk with a head.

    Policy       hidden (N, D) -> logits over the vocabulary        base, SFT, PPO policy, frozen reference
    ScalarModel  hidden (N, D) -> one number a token                reward model, critic

The reward model and the critic are the same function read at different places: the reward model at the last token of a
summary, the critic at every state of a response (N+ details 12 and 22).

With one post's numbers: docs/walk.md, stations 3, 4 and 7.
"""

import copy
import math

import torch
from torch import Tensor, nn

from kernels import PPOLoss, linear_cross_entropy, linear_fp32, linear_kl, linear_logprob, linear_ppo_loss
from nanorlhf import sharding
from nanorlhf.attention import causal
from nanorlhf.llama import Llama, LlamaConfig
from nanorlhf.packing import Packed, pack


class Policy(nn.Module):
    """A language model. With tied embeddings (Llama-3.2-1B) the head's weight is the embedding itself."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Llama(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:  # (V, D)
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(self, packed: Packed, read: Tensor | None = None) -> Tensor:
        """Hidden states of a packed batch, (N, D), or of its rows `read` (n,) alone, (n, D)."""
        return self.model(packed.tokens, packed.positions, causal(packed), read)

    def cross_entropy(self, packed: Packed, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum of weights * -log p(label), (): next-token loss, fused with the head. labels (N,) int64; weights (N,)"""
        return linear_cross_entropy(self.hidden(packed), self.head_weight, labels, weights)

    def response_logprobs(self, packed: Packed, responses: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-prob of each response token and entropy before it, both at the sampling temperature.

        The one function behind behaviour, reference and new log-probs: when the temperature is missing in only one of
        them, the ratio is not 1 and the KL not 0 before the first update (trap T15).

        args: packed: sequences that end in the R response tokens; responses (B, R) int64
        -> logprobs (B, R) fp32, entropy (B, R) fp32
        """
        hidden = self.response_hidden(packed, responses.shape[1])  # (B*R, D)
        logprobs, entropy = linear_logprob(hidden, self.head_weight, responses.flatten(), temperature)
        return logprobs.view_as(responses), entropy.view_as(responses)

    def response_hidden(self, packed: Packed, response_length: int) -> Tensor:
        """Hidden states before each response token, (B*R, D): head and last layer run only where they are read."""
        return self.hidden(packed, packed.response_rows(response_length).flatten())

    def response_ppo_loss(
        self, packed: Packed, responses: Tensor, logprobs: Tensor, advantages: Tensor, weights: Tensor,
        temperature: float, cliprange: float,
    ) -> PPOLoss:  # fmt: skip
        """`ppo.policy_loss` of the new log-probs, fused with the head: the gradient is made chunk by chunk, no logits
        are kept.

        args: responses (B, R) int64; logprobs, advantages (B, R) fp32; weights (B, R) fp32: action_mask divided by the
        tokens of the minibatch
        -> PPOLoss: loss (), logprobs (B, R) and entropy (B, R) of the policy as it is now, clipfrac ()
        """
        hidden = self.response_hidden(packed, responses.shape[1])  # (B*R, D)
        rows = (x.flatten() for x in (responses, logprobs, advantages, weights))
        loss, new_logprobs, entropy, clipfrac = linear_ppo_loss(
            hidden, self.head_weight, *rows, temperature=temperature, cliprange=cliprange
        )
        return PPOLoss(loss, new_logprobs.view_as(responses), entropy.view_as(responses), clipfrac)

    def response_kl(
        self, packed: Packed, responses: Tensor, temperature: float, hidden: Tensor, head_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`response_kl` of another policy, whose hidden states (B*R, D) and head (V, D) these are, to this one."""
        own = self.response_hidden(packed, responses.shape[1]), self.head_weight
        return linear_kl(hidden, head_weight, *own, responses.flatten(), temperature)

    @torch.no_grad()
    def logits(self, sequences: list[list[int]]) -> list[Tensor]:
        """Logits of every token of each sequence: a list of (T_i, V) fp32. Training never forms them."""
        packed = pack(sequences, device=self.head_weight.device)
        logits = linear_fp32(self.hidden(packed), self.head_weight)
        return packed.unpack(logits)


class ScalarModel(nn.Module):
    """A trunk with one linear output: reward model (`score_shift`, no bias) or critic (bias, shift 0).

    Bradley-Terry gives a bias no gradient, so the reward model has none; its scores are shifted after training so that
    the references of the SFT set have mean 0 (N+ detail 15). The critic takes the shift over as a trainable bias.
    """

    def __init__(self, config: LlamaConfig, bias: bool, score_shift: float = 0.0):
        super().__init__()
        self.config = config
        self.model = Llama(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=bias)
        self.score_shift = score_shift
        self.shift_posts: int | None = None  # whose mean score the shift is: how well it is known

    def token_scores(self, packed: Packed) -> Tensor:
        """The head at every token minus the shift, (N,) fp32."""
        return self._head(self.model(packed.tokens, packed.positions, causal(packed)))

    def last_scores(self, packed: Packed) -> Tensor:
        """The score of each sequence, read at its last token, (B,) fp32 (N+ detail 12: the token is EOS)."""
        return self._head(self.model(packed.tokens, packed.positions, causal(packed), packed.last_rows()))

    def response_values(self, packed: Packed, response_length: int) -> Tensor:
        """V of the state before each response token, (B, R) fp32, for sequences that end in R response tokens."""
        rows = packed.response_rows(response_length)  # (B, R)
        hidden = self.model(packed.tokens, packed.positions, causal(packed), rows.flatten())  # (B*R, D)
        return self._head(hidden).view(rows.shape)

    def _head(self, hidden: Tensor) -> Tensor:  # (..., D) -> (...), in fp32: a bf16 score moves in steps of 1/32
        return self.score(hidden.float())[..., 0] - self.score_shift

    @torch.no_grad()
    def scores(self, sequences: list[list[int]]) -> Tensor:
        """Normalised score of each sequence at its last token, (B,) fp32."""
        return self.last_scores(pack(sequences, device=self.score.weight.device))

    @torch.no_grad()
    def values(self, sequences: list[list[int]]) -> list[Tensor]:
        """Value of every state of each sequence: a list of (T_i,) fp32; element t has read tokens 0..t."""
        packed = pack(sequences, device=self.score.weight.device)
        return packed.unpack(self.token_scores(packed))


def response_kl(
    policy: Policy, reference: Policy, packed: Packed, responses: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact KL(policy || reference) before each response token, over the whole vocabulary; no gradient.

    args: packed: sequences that end in the R response tokens; responses (B, R) int64
    -> kl (B, R) fp32 in nats; logprobs, ref_logprobs (B, R) fp32 of the response tokens
    """
    hidden = policy.response_hidden(packed, responses.shape[1])  # (B*R, D)
    kl, logprobs, ref_logprobs = reference.response_kl(packed, responses, temperature, hidden, policy.head_weight)
    return kl.view_as(responses), logprobs.view_as(responses), ref_logprobs.view_as(responses)


def reward_model_from(policy: Policy, seed: int) -> ScalarModel:
    """A new reward model: a copy of the SFT model's trunk, a head drawn from N(0, 1/sqrt(D+1)) (N+ details 10, 11)."""
    D = policy.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    return _scalar(policy, torch.randn(1, D, generator=generator) / math.sqrt(D + 1), bias=None)


def critic_from(reward_model: ScalarModel) -> ScalarModel:
    """A critic that starts as the reward model: same trunk, same head, the shift as its bias (N+ detail 22).

    So before the first update V(state after EOS) equals the score of the response: an identity worth testing.
    """
    bias = 0.0 if reward_model.score.bias is None else sharding.whole(reward_model.score.bias).item()
    weight = sharding.whole(reward_model.score.weight.detach())
    return _scalar(reward_model, weight, bias=bias - reward_model.score_shift)


def _scalar(source: Policy | ScalarModel, weight: Tensor, bias: float | None) -> ScalarModel:
    """A ScalarModel on a copy of the trunk. Its head is fp32 in any case: 2,049 numbers that set the scale."""
    trunk = source.model
    with torch.device("meta"):
        model = ScalarModel(source.config, bias=bias is not None)
    if sharding.in_parts(source):
        model = sharding.shard(model, sharding.dtype_of(source)).to_empty(device=trunk.embed_tokens.weight.device)
        sharding.copy_parts(model.model, trunk)
    else:
        model.model = copy.deepcopy(trunk)
        model.score.to_empty(device=trunk.embed_tokens.weight.device)
    with torch.no_grad():
        sharding.fill(model.score.weight, weight)
        if bias is not None:
            model.score.bias.fill_(bias)
    return model


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
