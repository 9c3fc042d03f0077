"""Log-probability of a label and entropy of the distribution, straight from hidden states and the head's weight.

    z = h W^T / T          logits at temperature T            h (M, D), W (V, D)
    logprob = z[y] - logsumexp(z)
    entropy = logsumexp(z) - sum_v softmax(z)_v z_v

The logits (M, V) are what runs out of memory at V = 128,256: 3.5 GB in fp32 for the 6,784
response positions of one PPO batch, and half a dozen copies of it in naive code. So they are
made one chunk of rows at a time, and for the gradient made again. Everything after the matmul
is fp32: logits in bf16 give log-probs that are off by 0.03, against a PPO clip of 0.2.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.linear import linear_fp32

CHUNK_ELEMENTS = 2**28  # logits at a time: 1 GB in fp32, 2,093 rows of Llama 3's vocabulary


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The specification: the formula above, with all logits at once."""
    logits = linear_fp32(hidden, weight) / temperature  # (M, V)
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)  # finite logits only: exp(-inf) * -inf would be nan
    return logprobs.gather(-1, labels[:, None])[:, 0], entropy


def linear_logprob(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy in nats at a temperature; differentiable in hidden and weight.

    args: hidden (M, D); weight (V, D), same dtype; labels (M,) int64; temperature > 0
    -> logprobs (M,) fp32, entropy (M,) fp32
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature: got {temperature}, expected a number greater than 0; take the argmax for greedy decoding"
        )
    if hidden.shape[0] != labels.shape[0] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"shapes: got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}, "
            "expected (M, D), (V, D), (M,)"
        )
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if hidden.shape[0] <= rows:
        return linear_logprob_reference(hidden, weight, labels, temperature)
    chunks = [
        checkpoint(linear_logprob_reference, h, weight, y, temperature, use_reentrant=False)
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
