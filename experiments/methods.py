"""The arithmetic of DPO, RLOO, GRPO and best-of-n: pure functions. PPO's is in nanorlhf/ppo.py; its masks and its
clipped loss serve RLOO and GRPO too.

Dimensions: B responses, K of each query, one after the other; R tokens a response; M samples of one post.
"""

import math

import numpy as np
import torch
from torch import Tensor

from nanorlhf import ppo
from nanorlhf.evaluation.judge import EQUAL
from nanorlhf.losses import bradley_terry_loss

# --- DPO -------------------------------------------------------------------------------------------------------------


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """beta (log p(y|x) - log p_ref(y|x)): the reward whose optimum this policy is (Rafailov et al. 2023, eq. 5).

    args: logprobs, ref_logprobs (B,) fp32, of whole responses, EOS included -> (B,), up to a constant of the post
    """
    return beta * (logprobs - ref_logprobs)


def dpo_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """DPO is the reward model's loss on implicit rewards, (B,) each -> (): ln 2 while the policy is the reference
    (Rafailov et al. 2023, eq. 7)."""
    return bradley_terry_loss(chosen_rewards, rejected_rewards)


# --- RLOO and GRPO ---------------------------------------------------------------------------------------------------


def leave_one_out(rewards: Tensor, K: int) -> Tensor:
    """RLOO: each reward minus the mean of the others of its query (Kool et al. 2019; Ahmadian et al. 2024, eq. 8).

    The others do not depend on the response, so the baseline leaves the gradient's mean as it is. (B,) -> (B,)
    """
    groups = rewards.view(-1, K)
    others = (groups.sum(1, keepdim=True) - groups) / (K - 1)
    return (groups - others).flatten()


def group_normalised(rewards: Tensor, K: int) -> Tensor:
    """GRPO: (reward - mean of its query's) / (their standard deviation + 1e-4) (Shao et al. 2024, section 4.1.2).

    The deviation is unbiased and the 1e-4 is TRL's: equal rewards give 0. (B,) -> (B,)
    """
    groups = rewards.view(-1, K)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


ADVANTAGES = {"rloo": leave_one_out, "grpo": group_normalised}


def token_weights(action_mask: Tensor, algorithm: str) -> Tensor:
    """How much each token of a minibatch counts in the loss, (B, R) fp32, 0 where masked; they add up to 1.

    rloo: all alike, so a response counts by its sum, as in the policy gradient of whole responses.
    grpo: each response alike, by its mean (Shao et al. 2024, eq. 3): a long bad response is blamed less for each token.
    """
    if algorithm == "grpo":
        return action_mask / (action_mask.sum(1, keepdim=True) * len(action_mask))
    return action_mask / action_mask.sum()


def k3(new_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-x) - 1 + x with x = log p - log p_ref, of each token: never negative, its mean is KL(p || p_ref) (Schulman
    2020). (B, R) -> (B, R)"""
    x = new_logprobs - ref_logprobs
    return torch.exp(-x) - 1 + x


def group_loss(
    new_logprobs: Tensor, logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, weights: Tensor, mask: Tensor,
    cliprange: float, kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """PPO's clipped loss with one advantage a response, plus kl_coef times k3 where the KL is in the loss.

    args: new_logprobs, logprobs, ref_logprobs, weights (B, R) fp32; advantages (B,); mask (B, R) bool; kl_coef: 0 where
    the KL is in the reward
    -> the loss (), its policy part (), its KL part without kl_coef ()
    """
    # The clipped loss is homogeneous in the advantage, so the weights may stand there.
    policy, _ = ppo.policy_loss(new_logprobs, logprobs, advantages[:, None] * weights, mask, cliprange, denominator=1)
    kl = (weights * k3(torch.where(mask, new_logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0))).sum()
    return policy + kl_coef * kl, policy, kl


# --- best of n -------------------------------------------------------------------------------------------------------


def rank_weights(M: int, n: int) -> np.ndarray:
    """Probability that the i-th lowest of M samples is the best of n drawn from them without replacement, (M,) float64:
    C(i, n-1) / C(M, n), i from 0 (Nakano et al. 2021, appendix I)."""
    return np.array([math.comb(i, n - 1) / math.comb(M, n) for i in range(M)])


def best_of(scores: np.ndarray, values: np.ndarray, n: int) -> float:
    """Mean over all subsets of n samples of the value of the one that scores highest: unbiased. scores, values (M,)."""
    return float(rank_weights(len(scores), n) @ values[np.argsort(scores, kind="stable")])


def best_of_wins(scores: np.ndarray, gold: np.ndarray, n: int) -> float:
    """How often the best of n of the other samples has more gold than a sample, ties half: mean over every choice of
    the one and of the n, so the two are independent, and for n = 1 it is 0.5. scores, gold (M,), M > n."""
    M, gold = len(scores), gold[np.argsort(scores, kind="stable")]
    i, j = np.arange(M)[:, None], np.arange(M)[None]  # the best, its opponent: by rank
    margin = gold[:, None] - gold[None]
    outcomes = np.where(np.abs(margin) <= EQUAL, 0.5, margin > 0)
    weights = rank_weights(M - 1, n)[np.minimum(i - (j < i), M - 2)]  # of i among the M - 1 that are not j
    return float((weights * outcomes * (i != j)).sum() / M)


def kl_bound(n: int) -> float:
    """log n - (n-1)/n nats: the KL of best-of-n from its policy if no response can occur twice, else an upper bound
    (Stiennon et al. 2020, appendix G.3; Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def kl_estimate(probability: np.ndarray, n: int) -> np.ndarray:
    """The KL of best-of-n where the winner has this probability under the policy, and no other one can occur twice
    (Beirami et al. 2024, section 4). Its mean over winners estimates the KL; at probability 0 it is `kl_bound`."""
    p = np.clip(probability, 1e-12, 1.0)
    other = -np.expm1(n * np.log1p(-np.minimum(p, 1 - 1e-12)))  # 1 - (1-p)^n: that at least one of n is it
    if n == 1:
        return np.zeros_like(p)
    rest = (1 - other) * (kl_bound(n) + (n - 1) * np.log1p(-np.minimum(p, 1 - 1e-12)))
    return rest + other * np.log(other / p)
