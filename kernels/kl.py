"""Exact KL divergence over the whole vocabulary, from two logit matrices, and both log-probs of a label.

    KL(p || q) = sum_v p_v (log p_v - log q_v)
               = sum_v p_v (z_v - x_v) / T - lse(z / T) + lse(x / T)        z, x: logits of p and q

Where PPO's sampled k1 estimates this sum from the one token that was drawn, here is the sum itself. Naive PyTorch makes
about ten passes over two (M, V) matrices; the kernel reads each once.
"""

import torch
from torch import Tensor

from kernels.checks import check_labels, check_matrix, check_temperature
from kernels.runtime import EMPTY, LN2, MASKED, compute_type, jit, launch, log2_scale, tl, use_triton, wide

# Two rows at a time: half as many columns as logprob_entropy, or registers spill.
ROW = dict(BLOCK=2048, num_warps=8)


def kl_reference(
    logits: Tensor, reference_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification."""
    logp, logq = (
        torch.log_softmax(x.to(wide(x.dtype)) / temperature, dim=-1) for x in (logits, reference_logits.detach())
    )
    p = logp.exp()
    kl = (p * torch.where(p > 0, logp - logq, 0.0)).sum(-1)  # a token that p never takes costs nothing
    logprobs, ref_logprobs = (x.gather(-1, labels[:, None])[:, 0] for x in (logp, logq))
    return kl, logprobs, ref_logprobs


@jit
def _kl_fwd(
    logits,  # in   (M, V) of p
    reference_logits,  # in   (M, V) of q
    labels,  # in   (M,) int64
    kls,  # out  (M,)
    logprobs,  # out  (M,) log p_y
    ref_logprobs,  # out  (M,) log q_y
    tops,  # out  (M,) the maximum of p's logits, for the backward pass as what follows
    ref_tops,  # out  (M,) of q's
    log2sums,  # out  (M,) log2 of sum 2^((z - top) scale)
    ref_log2sums,  # out  (M,) of q's
    stride,
    ref_stride,
    scale,  # log2(e) / T
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program a row: running (max, sum) of each side a lane, and p's running sum w = sum e_v gap_v.

    gap_v = (z_v - z_y) - (x_v - x_y): relative to the label, so that a constant by which the two rows differ, which KL
    does not see, goes before anything is rounded, instead of cancelling after.
    """
    m = tl.program_id(0)
    row = logits + m.to(tl.int64) * stride
    ref_row = reference_logits + m.to(tl.int64) * ref_stride
    y = tl.load(labels + m)
    valid = (y >= 0) & (y < V)
    z_y = tl.load(row + y, mask=valid, other=float("nan")).to(COMPUTE)
    x_y = tl.load(ref_row + y, mask=valid, other=float("nan")).to(COMPUTE)
    both = (z_y > MASKED) & (x_y > MASKED)
    z_0 = tl.where(both, z_y, 0.0)
    x_0 = tl.where(both, x_y, 0.0)

    zm = tl.full([BLOCK], EMPTY, COMPUTE)
    xm = tl.full([BLOCK], EMPTY, COMPUTE)
    zs = tl.zeros([BLOCK], COMPUTE)
    xs = tl.zeros([BLOCK], COMPUTE)
    w = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(COMPUTE)
        x = tl.load(ref_row + columns, mask=columns < V, other=float("-inf")).to(COMPUTE)
        z = tl.where(z < MASKED, MASKED, z)
        x = tl.where(x < MASKED, MASKED, x)
        d = (z - zm) * scale
        e = tl.exp2(-tl.abs(d))
        gap = (z - z_0) - (x - x_0)
        w = tl.where(d > 0, w * e + gap, w + e * gap)
        zs = tl.where(d > 0, zs * e + 1.0, zs + e)
        zm = tl.where(d > 0, z, zm)
        d = (x - xm) * scale
        e = tl.exp2(-tl.abs(d))
        xs = tl.where(d > 0, xs * e + 1.0, xs + e)
        xm = tl.where(d > 0, x, xm)
    z_top = tl.max(zm, axis=0)
    x_top = tl.max(xm, axis=0)
    e = tl.exp2((zm - z_top) * scale)
    s = tl.sum(zs * e, axis=0)
    mean_gap = tl.sum(w * e, axis=0) / s
    log2s = tl.log2(s)
    ref_log2s = tl.log2(tl.sum(xs * tl.exp2((xm - x_top) * scale), axis=0))
    divergence = ((mean_gap - (z_top - z_0) + (x_top - x_0)) * scale - log2s + ref_log2s) * LN2
    tl.store(kls + m, tl.where(divergence > 1e15, float("inf"), divergence))  # q is 0 where p is not
    tl.store(logprobs + m, ((z_y - z_top) * scale - log2s) * LN2)
    tl.store(ref_logprobs + m, ((x_y - x_top) * scale - ref_log2s) * LN2)
    tl.store(tops + m, z_top)
    tl.store(ref_tops + m, x_top)
    tl.store(log2sums + m, log2s)
    tl.store(ref_log2sums + m, ref_log2s)


@jit
def _kl_bwd(
    logits,  # in   (M, V)
    reference_logits,  # in   (M, V)
    labels,  # in   (M,) int64
    kls,  # in   (M,)
    tops,  # in   (M,)
    ref_tops,  # in   (M,)
    log2sums,  # in   (M,)
    ref_log2sums,  # in   (M,)
    grad_kls,  # in   (M,)
    grad_logprobs,  # in   (M,)
    grad_logits,  # out  (M, V)
    stride,
    ref_stride,
    grad_stride,
    scale,  # log2(e) / T
    inverse_temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One program a row and block of columns.

    d KL      / d z_v = p_v (log p_v - log q_v - KL) / T
    d logprob / d z_v = (1[v = y] - p_v) / T
    """
    m = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = tl.load(logits + m.to(tl.int64) * stride + columns, mask=inside, other=float("-inf")).to(COMPUTE)
    x = tl.load(reference_logits + m.to(tl.int64) * ref_stride + columns, mask=inside, other=0.0).to(COMPUTE)
    log2p = (z - tl.load(tops + m)) * scale - tl.load(log2sums + m)
    log2q = (x - tl.load(ref_tops + m)) * scale - tl.load(ref_log2sums + m)
    p = tl.exp2(log2p)
    label = tl.where(columns == tl.load(labels + m), 1.0, 0.0)
    grad = tl.load(grad_kls + m) * tl.where(p > 0, p * ((log2p - log2q) * LN2 - tl.load(kls + m)), 0.0)
    grad += tl.load(grad_logprobs + m) * (label - p)
    grad = (grad * inverse_temperature).to(grad_logits.dtype.element_ty)
    tl.store(grad_logits + m.to(tl.int64) * grad_stride + columns, grad, mask=inside)


@torch.library.custom_op("nanorlhf::kl", mutates_args=())
def _forward(
    logits: Tensor, reference_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> kl, logprobs, ref_logprobs, and for the backward pass tops, ref_tops, log2sums, ref_log2sums"""
    M, V = logits.shape
    outputs = tuple(logits.new_empty(M, dtype=wide(logits.dtype)) for _ in range(7))
    if M:
        arguments = (logits, reference_logits, labels, *outputs, logits.stride(0), reference_logits.stride(0))
        scale = log2_scale(temperature)
        launch(_kl_fwd, (M,), *arguments, scale, V=V, COMPUTE=compute_type(logits), **ROW)
    return outputs


@torch.library.custom_op("nanorlhf::kl_backward", mutates_args=())
def _backward(
    logits: Tensor, reference_logits: Tensor, labels: Tensor, kl: Tensor, tops: Tensor, ref_tops: Tensor,
    log2sums: Tensor, ref_log2sums: Tensor, grad_kl: Tensor, grad_logprobs: Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    M, V = logits.shape
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if M:
        rows = (labels, kl, tops, ref_tops, log2sums, ref_log2sums, grad_kl.contiguous(), grad_logprobs.contiguous())
        strides = (logits.stride(0), reference_logits.stride(0), grad.stride(0))
        constants = dict(V=V, COMPUTE=compute_type(logits), **ROW)
        grid = (M, -(-V // ROW["BLOCK"]))
        scales = log2_scale(temperature), 1 / temperature
        launch(_kl_bwd, grid, logits, reference_logits, *rows, grad, *strides, *scales, **constants)
    return grad


@_forward.register_fake
def _(logits, reference_logits, labels, temperature):
    return tuple(logits.new_empty(logits.shape[0], dtype=wide(logits.dtype)) for _ in range(7))


@_backward.register_fake
def _(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, reference_logits, labels, ctx.temperature = inputs
    kl, _, ref_logprobs, *saved = output
    ctx.mark_non_differentiable(ref_logprobs, *saved)
    ctx.save_for_backward(logits, reference_logits, labels, kl, *saved)


def _gradient(ctx, grad_kl, grad_logprobs, *_):
    return _backward(*ctx.saved_tensors, grad_kl, grad_logprobs, ctx.temperature), None, None, None


_forward.register_autograd(_gradient, setup_context=_save)


def kl(
    logits: Tensor, reference_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p || q) in nats over the whole vocabulary, log p and log q of each label; differentiable in `logits`.

    args: logits of p (M, V); reference_logits of q (M, V), taken as constant; labels (M,) int64; temperature > 0
    -> kl, logprobs, ref_logprobs: (M,) fp32 each
    """
    check_temperature(temperature)
    check_matrix("logits", logits, ("M", "V"))
    check_matrix("reference_logits", reference_logits, tuple(logits.shape), like=logits)
    check_labels(labels, *logits.shape, like=logits)
    if not use_triton(logits):
        return kl_reference(logits, reference_logits, labels, temperature)
    divergence, logprobs, ref_logprobs, *_ = _forward(logits, reference_logits.detach(), labels, temperature)
    return divergence, logprobs, ref_logprobs
