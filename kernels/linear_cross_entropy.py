"""Weighted cross-entropy of next-token prediction, straight from hidden states and the head's weight.

    loss = sum_m  w_m * -log softmax(h_m W^T)[y_m]          h (M, D), W (V, D), w (M,)

The weights carry the whole normalisation: the SFT loss of the paper, a mean over sequences of
each sequence's token mean, is w = 1 / (B n_i). So a batch can be cut into microbatches
anywhere and the gradient stays the same. On all tokens of an SFT batch the logits would take
23 GB in fp32 at V = 128,256. The Triton path is that of `linear_ppo_loss` with another
coefficient: chunks of logits, the gradient finished on the way.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.checks import check_head, check_rows
from kernels.linear import linear_fp32
from kernels.linear_ppo_loss import linear_loss
from kernels.runtime import chunks, use_triton


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The specification: the formula above, with all logits at once."""
    logits = linear_fp32(hidden, weight)  # (M, V)
    return (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted token losses, in nats; differentiable once, in hidden and weight.

    args: hidden (M, D); weight (V, D), same dtype; labels (M,) int64; weights (M,), 0 where a token does not count
    -> loss () fp32
    """
    check_head(hidden, weight, labels)
    check_rows("weights", weights, hidden.shape[0], like=hidden)
    if use_triton(hidden):
        return linear_loss(hidden, weight, labels, weights, None, None, temperature=1.0, cliprange=0.0).loss
    slices = chunks(hidden.shape[0], weight.shape[0])
    if len(slices) <= 1:
        return linear_cross_entropy_reference(hidden, weight, labels, weights)
    losses = [
        checkpoint(linear_cross_entropy_reference, hidden[r], weight, labels[r], weights[r], use_reentrant=False)
        for r in slices
    ]
    return torch.stack(losses).sum()
