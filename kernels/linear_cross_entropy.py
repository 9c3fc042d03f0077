"""Weighted cross-entropy of next-token prediction, straight from hidden states and the head's weight.

    loss = sum_m  w_m * -log softmax(h_m W^T)[y_m]          h (M, D), W (V, D), w (M,)

The weights carry the whole normalisation: the SFT loss of the paper, a mean over sequences of
each sequence's token mean, is w = 1 / (B n_i). So a batch can be cut into microbatches
anywhere and the gradient stays the same. Logits are made one chunk of rows at a time and again
for the gradient: on all tokens of an SFT batch at V = 128,256 they would take 23 GB in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.linear import linear_fp32

CHUNK_ELEMENTS = 2**28  # logits at a time: 1 GB in fp32, 2,093 rows of Llama 3's vocabulary


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The specification: the formula above, with all logits at once."""
    logits = linear_fp32(hidden, weight)  # (M, V)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted token losses, in nats; differentiable in hidden and weight.

    args: hidden (M, D); weight (V, D), same dtype; labels (M,) int64; weights (M,) fp32, 0 where a token does not count
    -> loss () fp32
    """
    if hidden.shape[0] != labels.shape[0] or labels.shape != weights.shape or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"shapes: got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}, "
            f"weights {tuple(weights.shape)}, expected (M, D), (V, D), (M,), (M,)"
        )
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if hidden.shape[0] <= rows:
        return linear_cross_entropy_reference(hidden, weight, labels, weights)
    chunks = zip(hidden.split(rows), labels.split(rows), weights.split(rows), strict=True)
    losses = [checkpoint(linear_cross_entropy_reference, h, weight, y, w, use_reentrant=False) for h, y, w in chunks]
    return torch.stack(losses).sum()
