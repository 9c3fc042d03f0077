"""Several reward models that are asked together: what one of them overrates, the others may not (Coste et al. 2024).

    mean             of their scores
    min              the lowest: a response is as good as its severest judge says
    mean_minus_std   mean - standard deviation between them: what they disagree about counts less

Each has a `score_shift` of its own, so all give the authors' summaries mean 0 before they are combined. Their spread is
not made equal: models that were trained alike have nearly the same. One model is an ensemble of one, whatever the rule.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanorlhf.models import ScalarModel
from nanorlhf.packing import Packed

RULES = ("mean", "min", "mean_minus_std")


class Ensemble(nn.Module):
    """K reward models. The first is the one that the critic starts as."""

    def __init__(self, members: Sequence[ScalarModel]):
        super().__init__()
        self.members = nn.ModuleList(members)


def member_scores(reward_model: ScalarModel | Ensemble, packed: Packed) -> Tensor:
    """What each reward model says of each sequence, (B, K) fp32, each minus its own shift."""
    members = reward_model.members if isinstance(reward_model, Ensemble) else [reward_model]
    return torch.stack([member.last_scores(packed) for member in members], dim=1)


def combine(scores: Tensor, rule: str) -> Tensor:
    """(B, K) fp32 -> one score a response, (B,) fp32. The standard deviation is over the K, biased: of one it is 0."""
    if rule == "min":
        return scores.amin(dim=1)
    if rule == "mean_minus_std":
        return scores.mean(dim=1) - scores.std(dim=1, unbiased=False)
    return scores.mean(dim=1)
