"""Root-mean-square norm of rows, alone and together with the addition to the residual stream that comes before it.

    s = x + residual                       add_rms_norm; rms_norm has s = x
    y = w * s / sqrt(mean(s^2) + eps)      Zhang & Sennrich 2019

x (N, D), w (D,). The statistics are fp32, and the cast order is that of Hugging Face's Llama: s is rounded to the
dtype of x, s / rms is rounded to it again, then multiplied by w. In bf16 that is five operations of PyTorch (add, cast,
norm, cast, multiply), which move 30 bytes an element; the kernel reads x and residual and writes s and y, 8 bytes: 211
MB at the 12,896 tokens of 32 sequences and D = 2048.

The gradient of the weight is a sum over all rows. Each of P programs takes every P-th row and keeps its part of the sum
in registers, in fp32; the P parts are then added in a fixed order. No atomics: the same bits every time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.checks import check_matrix, check_rows
from kernels.runtime import INTERPRETED, compute_type, jit, launch, tl, triton, use_triton, wide

ROWS = 64 if INTERPRETED else 1  # at a time: on a GPU a row of 2048 keeps four warps busy
# P: four programs on each of Hopper's 132 multiprocessors, and 24 rows a program at 12,896 tokens. One a
# multiprocessor would leave the memory waiting for its reductions; one a row would write a weight gradient for each.
PROGRAMS = 2 if INTERPRETED else 528


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification."""
    normed = F.rms_norm(x.to(wide(x.dtype)), (x.shape[-1],), eps=eps)
    return weight * normed.to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification."""
    summed = residual + x
    return rms_norm_reference(summed, weight, eps), summed


@jit
def _rms_norm_fwd(
    x,  # in   (N, D)
    residual,  # in   (N, D), with ADD
    weight,  # in   (D,)
    normed,  # out  (N, D)
    summed,  # out  (N, D), with ADD
    scales,  # out  (N,) 1 / rms, for the backward pass
    eps,
    N,
    D: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # D, padded to a power of 2
    COMPUTE: tl.constexpr,
):
    """One program ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    at = rows[:, None] * D + columns[None, :]
    s = tl.load(x + at, mask=inside, other=0.0).to(COMPUTE)
    if ADD:
        s += tl.load(residual + at, mask=inside, other=0.0).to(COMPUTE)
        s = s.to(summed.dtype.element_ty)  # the norm sees what the residual stream holds
        tl.store(summed + at, s, mask=inside)
        s = s.to(COMPUTE)
    scale = 1 / tl.sqrt(tl.sum(s * s, axis=1) / D + eps)
    tl.store(scales + rows, scale, mask=rows < N)
    s = (s * scale[:, None]).to(normed.dtype.element_ty).to(COMPUTE)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(COMPUTE)
    tl.store(normed + at, (s * w[None, :]).to(normed.dtype.element_ty), mask=inside)


@jit
def _rms_norm_bwd(
    summed,  # in   (N, D)
    weight,  # in   (D,)
    scales,  # in   (N,)
    grad_normed,  # in   (N, D)
    grad_summed,  # in   (N, D), with ADD
    grad_x,  # out  (N, D)
    grad_weights,  # out  (P, D) each program's part
    N,
    D: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program p takes rows p, p + P, p + 2P, ... (where ROWS is 1).

    With n = s / rms and g the gradient of y:

    d / d s_j = (g_j w_j - n_j mean_i(g_i w_i n_i)) / rms  (+ the gradient of s itself, with ADD)
    d / d w_j = sum over rows of g_j n_j
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(COMPUTE)[None, :]
    grad_w = tl.zeros([ROWS, BLOCK], COMPUTE)
    for first in tl.range(program * ROWS, N, tl.num_programs(0) * ROWS, num_stages=2):  # the next is loaded meanwhile
        rows = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & (columns < D)[None, :]
        at = rows[:, None] * D + columns[None, :]
        s = tl.load(summed + at, mask=inside, other=0.0)
        g = tl.load(grad_normed + at, mask=inside, other=0.0).to(COMPUTE)
        scale = tl.load(scales + rows, mask=rows < N, other=0.0)[:, None]
        n = s.to(COMPUTE) * scale
        grad_w += g * n.to(s.dtype).to(COMPUTE)  # the weight met n as it was rounded
        g *= w
        grad = (g - n * (tl.sum(g * n, axis=1) / D)[:, None]) * scale
        if ADD:
            grad += tl.load(grad_summed + at, mask=inside, other=0.0).to(COMPUTE)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weights + program * D + columns, tl.sum(grad_w, axis=0), mask=columns < D)


def _row(D: int) -> dict:
    """A whole row at once: 16 numbers a thread, in 128-bit loads, up to D = 8192, and 16 warps beyond."""
    block = triton.next_power_of_2(D)
    return dict(ROWS=ROWS, BLOCK=block, num_warps=min(16, max(1, block // 512)))


def _norm_rows(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> normed, summed (N, D), scales (N,); without a residual there is no sum."""
    N, D = x.shape
    add = residual is not None
    nothing = x.new_empty(0)
    normed, summed = torch.empty_like(x), torch.empty_like(x) if add else nothing
    scales = x.new_empty(N, dtype=wide(x.dtype))
    if N:
        arguments = (x, residual if add else nothing, weight, normed, summed, scales, eps, N)
        launch(_rms_norm_fwd, (-(-N // ROWS),), *arguments, D=D, ADD=add, COMPUTE=compute_type(x), **_row(D))
    return normed, summed, scales


@torch.library.custom_op("nanorlhf::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> normed, and for the backward pass scales"""
    normed, _, scales = _norm_rows(x, None, weight, eps)
    return normed, scales


@torch.library.custom_op("nanorlhf::add_rms_norm", mutates_args=())
def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> normed, summed, and for the backward pass scales"""
    return _norm_rows(x, residual, weight, eps)


@torch.library.custom_op("nanorlhf::rms_norm_backward", mutates_args=())
def _backward(
    summed: Tensor, weight: Tensor, scales: Tensor, grad_normed: Tensor, grad_summed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> gradients of x (and the residual: it is the same) and of the weight"""
    N, D = summed.shape
    grad_x = torch.empty_like(summed)
    programs = min(PROGRAMS, -(-N // ROWS))
    parts = summed.new_empty(programs, D, dtype=wide(summed.dtype))
    if N:
        add = grad_summed is not None
        grad_summed = grad_summed.contiguous() if add else summed.new_empty(0)
        arguments = (summed, weight, scales, grad_normed.contiguous(), grad_summed, grad_x, parts, N)
        launch(_rms_norm_bwd, (programs,), *arguments, D=D, ADD=add, COMPUTE=compute_type(summed), **_row(D))
    return grad_x, parts.sum(0).to(weight.dtype)


@_forward.register_fake
def _(x, weight, eps):
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=wide(x.dtype))


@_add_forward.register_fake
def _(x, residual, weight, eps):
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[0], dtype=wide(x.dtype))


@_backward.register_fake
def _(summed, weight, *_):
    return torch.empty_like(summed), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    _, scales = output
    ctx.mark_non_differentiable(scales)
    ctx.save_for_backward(x, weight, scales)


def _gradient(ctx, grad_normed, _):
    return *_backward(*ctx.saved_tensors, grad_normed, None), None


def _add_save(ctx, inputs, output):
    _, _, weight, _ = inputs
    _, summed, scales = output
    ctx.mark_non_differentiable(scales)
    ctx.set_materialize_grads(False)  # after the last norm nobody reads the sum: None, not a matrix of zeros
    ctx.save_for_backward(summed, weight, scales)


def _add_gradient(ctx, grad_normed, grad_summed, _):
    if grad_normed is None:
        return grad_summed, grad_summed, None, None
    grad, grad_weight = _backward(*ctx.saved_tensors, grad_normed, grad_summed)
    return grad, grad, grad_weight, None


_forward.register_autograd(_gradient, setup_context=_save)
_add_forward.register_autograd(_add_gradient, setup_context=_add_save)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    check_matrix("x", x, ("N", "D"))
    check_rows("weight", weight, x.shape[1], like=x, dtype=x.dtype)
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, expected a number greater than 0")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w * x / rms(x), the mean square in fp32; differentiable in x and weight.

    args: x (N, D); weight (D,), same dtype; eps > 0, added to the mean square -> (N, D) in the dtype of x
    """
    _check(x, weight, eps)
    if use_triton(x):
        return _forward(x, weight, eps)[0]
    return (cpu.rms_norm if cpu.by_hand(x) else rms_norm_reference)(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, then norm: differentiable in x, residual and weight.

    args: x, residual (N, D), same dtype; weight (D,), same dtype; eps > 0
    -> rms_norm(x + residual), x + residual: (N, D) each in the dtype of x
    """
    _check(x, weight, eps)
    check_matrix("residual", residual, tuple(x.shape), like=x)
    if use_triton(x):
        return _add_forward(x, residual, weight, eps)[:2]
    return (cpu.add_rms_norm if cpu.by_hand(x) else add_rms_norm_reference)(x, residual, weight, eps)
