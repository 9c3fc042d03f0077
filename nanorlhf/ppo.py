"""PPO's arithmetic: masks, scores, rewards, advantages, losses. Pure functions on (B, R) tensors, in fp32.

A response is R tokens, sampled without stopping (N+ detail 23.1). L is the index of its
first EOS, or R-1 where there is none.

    index          0     1     2     3     4
    response       the   end   EOS   xyz   abc      L = 2: what comes after EOS was sampled but does not count
    action_mask    1     1     1     0     0        tokens the policy is responsible for          t <= L
    value_mask     1     1     1     1     0        states whose value is trained                 t <= L+1
    rewards        -k0   -k1   -k2   s     0        k: KL penalty; s: the score, one step after EOS

Value t belongs to the state *before* token t, so value L+1 is that of the finished response, and it is trained
towards s. Masks are bool and True where something counts. They come from the first EOS, never from PAD.

With one post's numbers: docs/walk.md, stations 6 to 12.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Experience(NamedTuple):
    """A batch of B episodes as the rollout and the scores leave it: fixed while PPO's epochs go over it (trap T47)."""

    sequences: list[list[int]]  # B queries with their responses, token ids
    responses: Tensor  # (B, R) int64, as sampled
    action_mask: Tensor  # (B, R) bool
    value_mask: Tensor  # (B, R) bool
    logprobs: Tensor  # (B, R) fp32, of the policy that sampled
    values: Tensor  # (B, R) fp32, 0 outside value_mask
    advantages: Tensor  # (B, R) fp32, whitened, 0 outside action_mask
    returns: Tensor  # (B, R) fp32
    # Where they come from: logged, not learned from.
    scores: Tensor | None = None  # (B,) fp32, after the missing-EOS rule
    kl: Tensor | None = None  # (B, R) fp32, k1, 0 outside action_mask
    full_kl: Tensor | None = None  # (B, R) fp32, with --kl_estimator full
    rewards: Tensor | None = None  # (B, R) fp32
    raw_advantages: Tensor | None = None  # (B, R) fp32, before whitening


# --- masks -----------------------------------------------------------------------------------------------------------


def last_token(responses: Tensor, eos_id: int) -> Tensor:
    """L: index of the first EOS, or R-1 where there is none. responses (B, R) -> (B,) int64."""
    is_eos = responses == eos_id
    first = is_eos.int().argmax(dim=1)  # 0 where there is no EOS
    return torch.where(is_eos.any(dim=1), first, responses.shape[1] - 1)


def _index(responses: Tensor) -> Tensor:
    return torch.arange(responses.shape[1], device=responses.device)  # (R,)


def action_mask(responses: Tensor, eos_id: int) -> Tensor:
    """True up to and including the first EOS: t <= L. (B, R) int64 -> (B, R) bool. (N+ ppo.py:670-677, inverted)"""
    return _index(responses) <= last_token(responses, eos_id)[:, None]


def value_mask(responses: Tensor, eos_id: int) -> Tensor:
    """True one state further than action_mask: t <= L+1. (B, R) int64 -> (B, R) bool."""
    return _index(responses) <= last_token(responses, eos_id)[:, None] + 1


def truncate(responses: Tensor, eos_id: int, pad_id: int) -> Tensor:
    """Everything after the first EOS becomes PAD: what the reward model and people see (N+ detail 23.2). (B, R)."""
    return responses.masked_fill(~action_mask(responses, eos_id), pad_id)


# --- scores and rewards ----------------------------------------------------------------------------------------------


def apply_missing_eos(scores: Tensor, responses: Tensor, eos_id: int, penalty: float = -1.0) -> Tensor:
    """A response without EOS gets `penalty` in place of its score (N+ detail 23.3); EOS in the last slot counts as EOS.

    args: scores (B,) fp32; responses (B, R) int64 -> (B,) fp32
    """
    has_eos = (responses == eos_id).any(dim=1)
    return torch.where(has_eos, scores, torch.full_like(scores, penalty))


def token_rewards(scores: Tensor, kl: Tensor, responses: Tensor, eos_id: int, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t for t <= L, plus the score at L+1, or at L where the response fills all R slots.

    The score sits one step after EOS on purpose: its state, the finished response, has a
    value of its own (N+ ppo.py:679-685).

    args: scores (B,) fp32; kl (B, R) fp32, any value after EOS; responses (B, R) int64 -> rewards (B, R) fp32
    """
    rewards = torch.where(action_mask(responses, eos_id), -kl_coef * kl, 0.0)
    slot = (last_token(responses, eos_id) + 1).clamp(max=responses.shape[1] - 1)  # (B,)
    return rewards.scatter_add(1, slot[:, None], scores[:, None])


# --- advantages ------------------------------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) and the critic's targets.

        delta_t = r_t + gamma V_{t+1} - V_t          V_R = 0: nothing follows the last slot
        A_t     = delta_t + gamma lam A_{t+1}
        returns = A + V                              before whitening (trap T41)

    args: rewards (B, R), values (B, R) already 0 outside value_mask -> advantages (B, R), returns (B, R)
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True, (). An empty mask is an error: the mean of nothing is not 0."""
    count = mask.sum()
    if count == 0:
        raise ValueError("mask: got no True element, expected at least one token that counts")
    return torch.where(mask, x, 0.0).sum() / count


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the masked elements, biased variance; 0 where masked (N+ detail 25).

    With `shift_mean=False` the mean is added back, so that only the scale changes (N+ detail 24, reward whitening).
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


# --- losses ----------------------------------------------------------------------------------------------------------
#
# Both are masked means over the whole minibatch. A microbatch passes the minibatch's `denominator`, and then the losses
# (and the stats) of its microbatches add up to the minibatch's, wherever the cuts fall.


def policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    denominator: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of PPO (Schulman et al. 2017, eq. 7), with the sign of a loss.

        ratio = exp(new_logprob - logprob)
        loss  = mean_mask max(-A ratio, -A clip(ratio, 1-eps, 1+eps))       max, because both are negated

    args: new_logprobs, logprobs, advantages (B, R) fp32; mask (B, R) bool = action_mask
    -> loss (), stats: clipfrac (share where the clipped branch is the larger), approxkl (half the mean squared
    log-ratio), ratio and ratio_squared (means)
    """
    denominator = mask.sum() if denominator is None else denominator
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)  # before exp: what is masked must not overflow
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / denominator

    stats = {
        "clipfrac": mean((clipped > unclipped).float()).detach(),
        "approxkl": mean(0.5 * log_ratio**2).detach(),
        "ratio": mean(ratio).detach(),
        "ratio_squared": mean(ratio**2).detach(),
    }
    return mean(torch.maximum(unclipped, clipped)), stats


def value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float,
    denominator: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped squared error of the critic, including the 1/2 and not vf_coef (N+ ppo.py:735-745).

        V_clip = clip(V_new, V - eps, V + eps)
        loss   = 1/2 mean_mask max((V_new - returns)^2, (V_clip - returns)^2)

    args: new_values, values, returns (B, R) fp32; mask (B, R) bool = value_mask -> loss (), stats: clipfrac
    """
    denominator = mask.sum() if denominator is None else denominator
    # Before the square: 0 * inf would make the gradient of what is masked nan.
    new_values = torch.where(mask, new_values, 0.0)
    clipped = torch.clamp(new_values, values - cliprange_value, values + cliprange_value)
    error = (new_values - returns) ** 2
    clipped_error = (clipped - returns) ** 2

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / denominator

    return 0.5 * mean(torch.maximum(error, clipped_error)), {"clipfrac": mean((clipped_error > error).float()).detach()}
