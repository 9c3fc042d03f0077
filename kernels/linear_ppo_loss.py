"""The clipped policy loss of PPO, straight from hidden states and the head's weight, its gradient finished on the way.

    z         = h W^T / T                       h (M, D), W (V, D)
    logprob   = z[y] - lse(z)
    ratio     = exp(logprob - old_logprob)
    loss      = sum_m w_m max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))                  (Schulman et al. 2017, eq. 7)
    dloss/dz  = c (1[v = y] - p_v) / T          c = -w A ratio, or 0 where the clipped branch is the larger

The coefficient c depends on nothing outside its row. So once a chunk of logits exists, one row kernel can turn it into
loss and dz, and two more matmuls into the gradients of h and W: three matmuls, where a recomputing backward pass takes
four, and no logits are kept. At 6,784 rows of Llama 3's vocabulary: chunks of 1,696 rows, 0.87 GB of fp32 logits and
0.43 GB of bf16 dz at a time, where naive code holds 16 GB. dW adds up in fp32, in the order of the chunks: no atomics,
the same bits every time. `linear_cross_entropy` is the same with c = -w.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import check_head, check_rows, check_temperature
from kernels.linear import addmm_wide, mm_wide
from kernels.linear_logprob import linear_logprob, linear_logprob_reference
from kernels.logprob_entropy import ROW, row_stats
from kernels.runtime import LN2, LOG2E, chunks, compute_type, jit, launch, log2_scale, tl, use_triton, wide


class PPOLoss(NamedTuple):
    loss: Tensor  # () fp32, the only one with a gradient
    logprobs: Tensor  # (M,) fp32
    entropy: Tensor  # (M,) fp32, nats
    clipfrac: Tensor  # () fp32, sum of the weights of rows whose clipped branch is the larger


def linear_ppo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    temperature: float,
    cliprange: float,
) -> PPOLoss:
    """The specification, with all logits at once."""
    logprobs, entropy = linear_logprob_reference(hidden, weight, labels, temperature)
    return clipped_loss(logprobs, entropy, old_logprobs, advantages, weights, cliprange)


def clipped_loss(
    logprobs: Tensor, entropy: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, cliprange: float
) -> PPOLoss:
    """The formula, from log-probs. (M,) each."""
    log_ratio = torch.where(weights != 0, logprobs - old_logprobs, 0.0)  # before exp: what is masked must not overflow
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = (weights * torch.maximum(unclipped, clipped)).sum()
    clipfrac = (weights * (clipped > unclipped)).sum()
    return PPOLoss(loss, logprobs.detach(), entropy.detach(), clipfrac.detach())


@jit
def _loss_rows(
    logits,  # in   (M, V)
    labels,  # in   (M,) int64
    weights,  # in   (M,)
    old_logprobs,  # in   (M,), for PPO
    advantages,  # in   (M,), for PPO
    grad_logits,  # out  (M, V), with WITH_GRAD
    losses,  # out  (M,) weighted
    logprobs,  # out  (M,)
    entropies,  # out  (M,)
    clipped_rows,  # out  (M,) the weight where the clipped branch is the larger, else 0
    scale,  # log2(e) / T
    inverse_temperature,
    cliprange,
    V: tl.constexpr,
    PPO: tl.constexpr,  # else cross-entropy
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program a row. The logits are read twice, the second time mostly from L2."""
    m = tl.program_id(0)
    row = logits + m.to(tl.int64) * V
    top, s, u = row_stats(row, scale, V, BLOCK, COMPUTE)
    y = tl.load(labels + m)
    z_y = tl.load(row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(COMPUTE)
    log2s = tl.log2(s)
    logprob = ((z_y - top) * scale - log2s) * LN2
    weight = tl.load(weights + m).to(COMPUTE)
    if PPO:
        advantage = tl.load(advantages + m).to(COMPUTE)
        log_ratio = tl.where(weight != 0, logprob - tl.load(old_logprobs + m).to(COMPUTE), 0.0)
        ratio = tl.exp2(log_ratio * LOG2E)
        unclipped = -advantage * ratio
        clipped = -advantage * tl.minimum(tl.maximum(ratio, 1 - cliprange), 1 + cliprange)
        is_clipped = clipped > unclipped
        loss = tl.where(is_clipped, clipped, unclipped)
        coefficient = tl.where(is_clipped, 0.0, weight * unclipped)  # d loss / d logprob
        tl.store(clipped_rows + m, tl.where(is_clipped, weight, 0.0))
    else:
        loss = -logprob
        coefficient = -weight
    tl.store(losses + m, weight * loss)
    tl.store(logprobs + m, logprob)
    tl.store(entropies + m, (log2s - u / s) * LN2)
    if WITH_GRAD:
        grad_row = grad_logits + m.to(tl.int64) * V
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(COMPUTE)
            p = tl.exp2((z - top) * scale - log2s)
            label = tl.where(columns == y, 1.0, 0.0)
            grad = coefficient * inverse_temperature * (label - p)
            tl.store(grad_row + columns, grad.to(grad_logits.dtype.element_ty), mask=columns < V)


@torch.library.custom_op("nanorlhf::linear_loss", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, old_logprobs: Tensor | None,
    advantages: Tensor | None, temperature: float, cliprange: float, of_hidden: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> loss, logprobs, entropy, clipfrac, gradients of hidden and of weight (fp32), empty where not asked for"""
    M, V = hidden.shape[0], weight.shape[0]
    dtype = wide(hidden.dtype)
    losses, logprobs, entropy, clipped = (hidden.new_zeros(M, dtype=dtype) for _ in range(4))
    with_grad = of_hidden or of_weight
    grad_hidden = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=dtype) if of_weight else weight.new_empty(0, dtype=dtype)
    slices = chunks(M, V)
    size = slices[0].stop if slices else 0
    logits_buffer = hidden.new_empty(size, V, dtype=dtype)
    grad_buffer = hidden.new_empty(size if with_grad else 0, V)
    constants = dict(V=V, PPO=advantages is not None, WITH_GRAD=with_grad, COMPUTE=compute_type(hidden), **ROW)
    scalars = log2_scale(temperature), 1 / temperature, cliprange
    for rows in slices:
        n = rows.stop - rows.start
        logits = mm_wide(hidden[rows], weight.T, out=logits_buffer[:n])
        # Cross-entropy reads neither old log-probs nor advantages; a kernel argument has to be there all the same.
        per_row = [weights[rows] if x is None else x[rows] for x in (old_logprobs, advantages)]
        outputs = [x[rows] for x in (losses, logprobs, entropy, clipped)]
        arguments = (logits, labels[rows], weights[rows], *per_row, grad_buffer, *outputs)
        launch(_loss_rows, (n,), *arguments, *scalars, **constants)
        if of_hidden:
            torch.mm(grad_buffer[:n], weight, out=grad_hidden[rows])  # dh = dz W
        if of_weight:
            addmm_wide(grad_weight, grad_buffer[:n].T, hidden[rows], first=rows.start == 0)  # dW += dz^T h
    return losses.sum(), logprobs, entropy, clipped.sum(), grad_hidden, grad_weight


@_forward.register_fake
def _(hidden, weight, labels, weights, old_logprobs, advantages, temperature, cliprange, of_hidden, of_weight):
    dtype = wide(hidden.dtype)
    scalar, row = hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)
    grad_hidden = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=dtype) if of_weight else weight.new_empty(0, dtype=dtype)
    return scalar, row, torch.empty_like(row), torch.empty_like(scalar), grad_hidden, grad_weight


def _save(ctx, inputs, output):
    *_, ctx.of_hidden, ctx.of_weight = inputs
    ctx.weight_dtype = inputs[1].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or each gets a gradient of zeros: that of the weight's gradient is 1.05 GB
    ctx.save_for_backward(output[4], output[5])


def _gradient(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 10
    grad_hidden, grad_weight = ctx.saved_tensors
    of_hidden = grad_hidden * grad_loss if ctx.of_hidden else None  # 0-dim: stays in the dtype of grad_hidden
    of_weight = None
    if ctx.of_weight:  # scaled and rounded in one pass: at Llama 3's size this is a gigabyte
        of_weight = torch.mul(grad_weight, grad_loss, out=torch.empty_like(grad_weight, dtype=ctx.weight_dtype))
    return of_hidden, of_weight, *(None,) * 8


_forward.register_autograd(_gradient, setup_context=_save)


def linear_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, old_logprobs: Tensor | None,
    advantages: Tensor | None, temperature: float, cliprange: float,
) -> PPOLoss:  # fmt: skip
    """The Triton path of `linear_ppo_loss`, and without advantages of `linear_cross_entropy`."""
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    rows = [x.detach() if x is not None else None for x in (weights, old_logprobs, advantages)]
    loss, logprobs, entropy, clipfrac, _, _ = _forward(hidden, weight, labels, *rows, temperature, cliprange, *wanted)
    return PPOLoss(loss, logprobs, entropy, clipfrac)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    cliprange: float = 0.2,
) -> PPOLoss:
    """The clipped policy loss of PPO; differentiable once, in hidden and weight.

    args: hidden (M, D); weight (V, D), same dtype; labels (M,) int64; old_logprobs, advantages (M,); weights (M,), the
    whole normalisation: mask / number of tokens of the minibatch; temperature > 0; cliprange >= 0
    -> PPOLoss(loss (), logprobs (M,), entropy (M,), clipfrac ()), fp32
    """
    check_temperature(temperature)
    if not cliprange >= 0:
        raise ValueError(f"cliprange: got {cliprange}, expected 0 or more")
    check_head(hidden, weight, labels)
    for name, values in (("old_logprobs", old_logprobs), ("advantages", advantages), ("weights", weights)):
        check_rows(name, values, hidden.shape[0], like=hidden)
    if use_triton(hidden):
        return linear_loss(hidden, weight, labels, weights, old_logprobs, advantages, temperature, cliprange)
    logprobs, entropy = linear_logprob(hidden, weight, labels, temperature)
    return clipped_loss(logprobs, entropy, old_logprobs, advantages, weights, cliprange)
