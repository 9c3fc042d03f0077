"""The losses of SFT and of the reward model. PPO's are in ppo.py.

With one post's numbers: docs/walk.md, stations 3 and 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanorlhf.packing import Packed


def next_token_labels(packed: Packed) -> tuple[Tensor, Tensor]:
    """The label of each packed token, and whether it has one: the last token of a sequence predicts nothing.

    -> labels (N,) int64: the token that follows; counts (N,) bool
    """
    counts = torch.ones_like(packed.tokens, dtype=torch.bool)
    counts.index_fill_(0, packed.last_rows(), False)  # counts[...] = False would copy a number over, and wait
    counts[counts.shape[0] - packed.filling :] = False
    return packed.tokens.roll(-1), counts


def sequence_mean_weights(packed: Packed, counts: Tensor, sequences: int) -> Tensor:
    """Token weights w with which sum(w * token loss) is the mean over `sequences` of each sequence's token mean.

    The paper's SFT loss in effect: its microbatches of one sequence are means over their
    own tokens, averaged with equal weight (N+ detail 9, section 3.1). `sequences` is the
    size of the whole batch, so that microbatches add up to it.

    args: counts (N,) bool -> (N,) fp32, 0 where a token does not count
    """
    labels_per_sequence = packed.cu_seqlens.diff() - 1  # (B,)
    weights = 1.0 / (labels_per_sequence.clamp(min=1) * sequences)  # one token alone has no label, and inf * 0 is nan
    by_token = torch.repeat_interleave(weights, labels_per_sequence + 1, output_size=sum(packed.lengths))
    return F.pad(by_token, (0, packed.filling)) * counts


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """-mean log sigmoid(chosen - rejected), (): ln 2 when the two scores are equal (N+ detail 10, section 3.2).

    args: chosen_scores, rejected_scores (B,) fp32
    """
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def pair_accuracy(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Share of pairs whose chosen summary scores strictly higher; a tie is an error (N+ detail 10). (B,) each -> ()."""
    return (chosen_scores > rejected_scores).float().mean()
