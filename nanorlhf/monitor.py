"""What PPO logs about an update, under the names of the published runs so that curves overlay.

Averages count the tokens that count. Where the paper's code averages over padding too, its
version stands beside ours with the suffix `_paper`: there a padded slot adds 0 to approxkl
and clipfrac, 1 to the ratio, and -1 to the entropy of a response (traps T51 and T53).
"""

import numpy as np
import torch
from torch import Tensor

from nanorlhf.metrics import copied_ngrams, distinct_n, mean, title_copy
from nanorlhf.rollout import Summary
from nanorlhf.tiny import gold
from nanorlhf.tldr import Post


def objective(
    scores: Tensor,
    logprobs: Tensor,
    kl: Tensor,
    action_mask: Tensor,
    kl_coef: float,
    full_kl: Tensor | None = None,
) -> dict[str, float]:
    """What PPO maximises: means over responses of sums over tokens, in nats.

    args: scores (B,); logprobs, kl, action_mask (B, R); full_kl (B, R), with --kl_estimator full: what is penalised
    """
    penalised = kl if full_kl is None else full_kl
    non_score_reward = -kl_coef * penalised.sum(1).mean()
    surprise = torch.where(action_mask, -logprobs, 0.0).sum(1).mean()  # -log p of what was said estimates the entropy
    return {
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std().item(),
        "objective/kl": kl.sum(1).mean().item(),
        **({} if full_kl is None else {"objective/kl_full": full_kl.sum(1).mean().item()}),
        "objective/non_score_reward": non_score_reward.item(),
        "objective/rlhf_reward": (scores.mean() + non_score_reward).item(),
        "objective/entropy": surprise.item(),
        "objective/entropy_paper": (surprise - (~action_mask).float().sum(1).mean()).item(),
    }


def learning(totals: dict[str, Tensor], optimizer_steps: int, action_mask: Tensor) -> dict[str, float]:
    """Averages over the optimizer steps of an update, from their sums. action_mask (B, R)."""
    metrics = {name: (total / optimizer_steps).item() for name, total in totals.items()}
    metrics["val/ratio_var"] = metrics.pop("val/ratio_squared") - metrics["val/ratio"] ** 2
    counted = action_mask.float().mean().item()  # share of the B*R slots that count
    metrics["policy/approxkl_avg_paper"] = metrics["policy/approxkl_avg"] * counted
    metrics["policy/clipfrac_avg_paper"] = metrics["policy/clipfrac_avg"] * counted
    metrics["val/ratio_paper"] = metrics["val/ratio"] * counted + 1 - counted
    return metrics


def critic(
    values: Tensor, returns: Tensor, advantages: Tensor, action_mask: Tensor, value_mask: Tensor
) -> dict[str, float]:
    """How well the critic predicts: 1 is perfectly, 0 as well as a constant.

    args: all (B, R); advantages before whitening
    """
    errors, targets = (returns - values)[value_mask], returns[value_mask]
    return {
        "returns_mean": targets.mean().item(),
        "values_mean": values[value_mask].mean().item(),
        "explained_variance": (1 - errors.var() / targets.var()).item(),
        "advantages_max": advantages[action_mask].max().item(),
    }


def texts(summaries: list[Summary], posts: list[Post], scores: Tensor) -> dict[str, float]:
    """What can be seen in the text itself: whether it stops, and the ways in which a policy games a reward model.

    In the tiny world, where the truth is known, also its gold score. scores (B,)
    """
    pairs = list(zip(summaries, posts, strict=True))
    lengths = [len(s.text.split()) for s in summaries]
    vary = min(lengths) < max(lengths) and scores.min() < scores.max()  # otherwise a correlation is not defined
    metrics = {
        "val/num_eos_tokens": sum(s.has_eos for s in summaries),
        "val/eos_rate": sum(s.has_eos for s in summaries) / len(summaries),
        "hack/length": mean(lengths),
        "hack/length_score_corr": float(np.corrcoef(lengths, scores.tolist())[0, 1]) if vary else 0.0,
        "hack/title_copy": mean([title_copy(s.text, p.title) for s, p in pairs]),
        "hack/copy4": mean([copied_ngrams(s.text, p.post) for s, p in pairs]),
        "hack/distinct2": distinct_n([s.text for s in summaries]),
    }
    if posts[0].id.startswith("tiny-"):
        metrics["objective/gold"] = mean([gold.judge(p.id, s.text) for s, p in pairs])
    return metrics
