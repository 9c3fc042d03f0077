"""Log-probability of a label, entropy and logsumexp, from logits.

    lse     = log sum_v exp(z_v / T)
    logprob = z_y / T - lse
    entropy = lse - sum_v p_v z_v / T          p_v = exp(z_v / T - lse)

logits (M, V), labels (M,). Naive PyTorch goes over the (M, V) matrix about ten times: 54 GB in fp32 for the 6,784
response positions of a PPO batch at V = 128,256. The kernel reads it once, 1.7 GB in bf16, and writes three numbers a
row.
"""

import torch
from torch import Tensor

from kernels.checks import check_labels, check_matrix, check_temperature
from kernels.runtime import EMPTY, LN2, MASKED, compute_type, jit, launch, log2_scale, tl, use_triton, wide

# 4096 columns on 8 warps: 16 logits a thread, in 128-bit loads. Wider blocks spill, narrower ones load less at a time.
ROW = dict(BLOCK=4096, num_warps=8)


def logprob_entropy_reference(
    logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification."""
    z = logits.to(wide(logits.dtype)) / temperature  # (M, V)
    lse = z.logsumexp(dim=-1)
    logp = z - lse[:, None]
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0.0)).sum(-1)  # 0 log 0 = 0
    return logp.gather(-1, labels[:, None])[:, 0], entropy, lse


@jit
def row_stats(row, scale, V: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """(M, S, U) of one row: the maximum m, sum e_v and sum e_v d_v, where d_v = (z_v - m) scale and e_v = 2^d_v.

    A lane takes the logits of one 128-bit load at a time, all in one thread, and keeps its own running triple: no barrier
    in the loop, and only the end reduces across lanes. When a load brings a larger maximum, what was summed is rescaled
    to it, once for all its logits.
    """
    PER: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth  # logits of a load
    LANES: tl.constexpr = BLOCK // PER
    m = tl.full([LANES], EMPTY, COMPUTE)
    s = tl.zeros([LANES], COMPUTE)
    u = tl.zeros([LANES], COMPUTE)
    lanes = tl.arange(0, LANES)[:, None] * PER + tl.arange(0, PER)[None, :]
    for start in range(0, V, BLOCK):
        columns = start + lanes
        z = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(COMPUTE)
        z = tl.where(z < MASKED, MASKED, z)  # not maximum(): it would swallow a nan
        larger = tl.maximum(m, tl.max(z, axis=1))
        d = (z - larger[:, None]) * scale
        e = tl.exp2(d)
        fall = (m - larger) * scale
        rescale = tl.exp2(fall)
        u = (u + s * fall) * rescale + tl.sum(e * d, axis=1)
        s = s * rescale + tl.sum(e, axis=1)
        m = larger
    top = tl.max(m, axis=0)
    d = (m - top) * scale
    e = tl.exp2(d)
    return top, tl.sum(s * e, axis=0), tl.sum((u + s * d) * e, axis=0)


@jit
def _logprob_entropy_fwd(
    logits,  # in   (M, V)
    labels,  # in   (M,) int64
    logprobs,  # out  (M,)
    entropies,  # out  (M,)
    lses,  # out  (M,)
    tops,  # out  (M,) the maximum, for the backward pass
    log2sums,  # out  (M,) log2 of sum 2^((z - top) scale), for the backward pass
    stride,  # elements from one row of logits to the next
    scale,  # log2(e) / T
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program a row."""
    m = tl.program_id(0)
    row = logits + m.to(tl.int64) * stride  # 32 bits end at row 16,744 of Llama 3's vocabulary
    top, s, u = row_stats(row, scale, V, BLOCK, COMPUTE)
    y = tl.load(labels + m)
    z_y = tl.load(row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(COMPUTE)
    log2s = tl.log2(s)
    tl.store(logprobs + m, ((z_y - top) * scale - log2s) * LN2)
    tl.store(entropies + m, (log2s - u / s) * LN2)
    tl.store(lses + m, (top * scale + log2s) * LN2)
    tl.store(tops + m, top)
    tl.store(log2sums + m, log2s)


@jit
def _logprob_entropy_bwd(
    logits,  # in   (M, V)
    labels,  # in   (M,) int64
    entropies,  # in   (M,)
    tops,  # in   (M,)
    log2sums,  # in   (M,)
    grad_logprobs,  # in   (M,)
    grad_entropies,  # in   (M,)
    grad_lses,  # in   (M,)
    grad_logits,  # out  (M, V)
    stride,
    grad_stride,
    scale,  # log2(e) / T
    inverse_temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program a row and block of columns.

    log p_v is taken from the maximum, not from lse: of a row with an offset of -200, z / T - lse would lose digits.

    d logprob / d z_v = (1[v = y] - p_v) / T
    d entropy / d z_v = -p_v (log p_v + entropy) / T
    d lse     / d z_v = p_v / T
    """
    m = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = tl.load(logits + m.to(tl.int64) * stride + columns, mask=inside, other=float("-inf")).to(COMPUTE)
    log2p = (z - tl.load(tops + m)) * scale - tl.load(log2sums + m)
    p = tl.exp2(log2p)
    label = tl.where(columns == tl.load(labels + m), 1.0, 0.0)
    entropy_part = tl.where(p > 0, p * (log2p * LN2 + tl.load(entropies + m)), 0.0)  # 0 log 0 = 0
    grad = tl.load(grad_logprobs + m) * (label - p) - tl.load(grad_entropies + m) * entropy_part
    grad += tl.load(grad_lses + m) * p
    grad = (grad * inverse_temperature).to(grad_logits.dtype.element_ty)
    tl.store(grad_logits + m.to(tl.int64) * grad_stride + columns, grad, mask=inside)


def forward_rows(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Launch the forward kernel: (M, V), (M,) -> logprobs, entropy, lse, tops, log2sums, (M,) each."""
    M, V = logits.shape
    outputs = tuple(logits.new_empty(M, dtype=wide(logits.dtype)) for _ in range(5))
    scale = log2_scale(temperature)
    if M:
        arguments = (logits, labels, *outputs, logits.stride(0), scale)
        launch(_logprob_entropy_fwd, (M,), *arguments, V=V, COMPUTE=compute_type(logits), **ROW)
    return outputs


def backward_rows(
    logits: Tensor, labels: Tensor, saved: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor, Tensor],
    temperature: float, grad_logits: Tensor,
) -> None:  # fmt: skip
    """Launch the backward kernel, which writes grad_logits (M, V).

    saved: entropy, tops, log2sums; grads: of logprobs, entropy and lse
    """
    M, V = logits.shape
    if M:
        arguments = (logits, labels, *saved, *grads, grad_logits, logits.stride(0), grad_logits.stride(0))
        grid = (M, -(-V // ROW["BLOCK"]))
        constants = dict(V=V, COMPUTE=compute_type(logits), **ROW)
        scales = log2_scale(temperature), 1 / temperature
        launch(_logprob_entropy_bwd, grid, *arguments, *scales, **constants)


@torch.library.custom_op("nanorlhf::logprob_entropy", mutates_args=())
def _forward(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward_rows(logits, labels, temperature)


@torch.library.custom_op("nanorlhf::logprob_entropy_backward", mutates_args=())
def _backward(
    logits: Tensor, labels: Tensor, entropy: Tensor, tops: Tensor, log2sums: Tensor, grad_logprobs: Tensor,
    grad_entropy: Tensor, grad_lse: Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grads = tuple(grad.contiguous() for grad in (grad_logprobs, grad_entropy, grad_lse))
    backward_rows(logits, labels, (entropy, tops, log2sums), grads, temperature, grad_logits)
    return grad_logits


@_forward.register_fake
def _(logits, labels, temperature):
    return tuple(logits.new_empty(logits.shape[0], dtype=wide(logits.dtype)) for _ in range(5))


@_backward.register_fake
def _(logits, labels, entropy, tops, log2sums, grad_logprobs, grad_entropy, grad_lse, temperature):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, labels, ctx.temperature = inputs
    _, entropy, _, tops, log2sums = output
    ctx.mark_non_differentiable(tops, log2sums)
    ctx.save_for_backward(logits, labels, entropy, tops, log2sums)


def _gradient(ctx, grad_logprobs, grad_entropy, grad_lse, *_):
    grads = grad_logprobs, grad_entropy, grad_lse
    return _backward(*ctx.saved_tensors, *grads, ctx.temperature), None, None


_forward.register_autograd(_gradient, setup_context=_save)


def logprob_entropy(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each label, entropy and logsumexp in nats at a temperature; differentiable in the logits.

    args: logits (M, V), rows contiguous; labels (M,) int64; temperature > 0
    -> logprobs, entropy, lse: (M,) fp32 each. Logits of -inf have probability 0 and add nothing to the entropy.
    """
    check_temperature(temperature)
    check_matrix("logits", logits, ("M", "V"))
    check_labels(labels, *logits.shape, like=logits)
    if not use_triton(logits):
        return logprob_entropy_reference(logits, labels, temperature)
    logprobs, entropy, lse, _, _ = _forward(logits, labels, temperature)
    return logprobs, entropy, lse
