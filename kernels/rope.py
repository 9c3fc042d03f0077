"""Rotary position embedding of the merged q, k, v (Su et al. 2021), which leaves the three apart.

    (a, b) -> (a cos - b sin, b cos + a sin)        a, b: coordinates i and i + Dh/2 of a query or key head

qkv (N, H + 2 Hkv, Dh), an angle for each token and i < Dh/2. cos and sin are fp32 tables: bf16 holds neither position
300 nor an angle of it. v is not turned, only taken along, so that one launch reads qkv once and writes q, k and v, and
the backward pass, which turns by the opposite angle, reads their three gradients once and writes that of qkv as the one
matrix that the matmul before it wants. (With views of qkv instead, autograd would put the gradients together in two
more passes.) Hugging Face's rotate_half makes five operations of it for q and five for k: negate, concatenate, two
products and a sum.
"""

import torch
from torch import Tensor

from kernels import cpu
from kernels.checks import check_heads, check_matrix
from kernels.runtime import INTERPRETED, jit, launch, tl, triton, use_triton, wide

TOKENS = 64 if INTERPRETED else 1  # a program; 32 heads of 64 on 2 warps are 128-bit loads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn coordinate pair (i, i + Dh/2) of each head by its angle.

    args: x (N, heads, Dh); cos, sin (N, 1, Dh/2) -> like x
    """
    a, b = x.to(wide(x.dtype)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rope_reference(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The specification."""
    heads = qkv.shape[1] - 2 * kv_heads
    qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
    q, k = rotate(qk, cos[:, None], sin[:, None]).split((heads, kv_heads), dim=1)
    return q, k, v


@jit
def _turn(
    source,  # in   (N, HEADS, DH), `row` elements from one token to the next, `head_row` from one head to the next
    row,
    head_row,
    target,  # out  (N, HEADS, DH), likewise
    target_row,
    target_head_row,
    cos,  # in   (TOKENS, 1, HALF)
    sin,  # in   (TOKENS, 1, HALF)
    tokens,  # in   (TOKENS, 1, 1) int64
    N,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    SLOTS: tl.constexpr,  # HEADS, padded to a power of 2
    HALF: tl.constexpr,  # DH / 2, padded to a power of 2
    TURN: tl.constexpr,  # or only copied
):
    """The heads of TOKENS tokens."""
    heads = tl.arange(0, SLOTS)[None, :, None]
    i = tl.arange(0, HALF)[None, None, :]
    inside = (tokens < N) & (heads < HEADS) & (i < DH // 2)
    source += tokens * row + heads * head_row + i
    target += tokens * target_row + heads * target_head_row + i
    a = tl.load(source, mask=inside, other=0.0)
    b = tl.load(source + DH // 2, mask=inside, other=0.0)
    if TURN:
        a, b = a.to(cos.dtype), b.to(cos.dtype)
        a, b = a * cos - b * sin, b * cos + a * sin
    tl.store(target, a.to(target.dtype.element_ty), mask=inside)
    tl.store(target + DH // 2, b.to(target.dtype.element_ty), mask=inside)


@jit
def _angles(cos, sin, N, DH: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr):
    """This program's tokens (TOKENS, 1, 1), and their cos and sin (TOKENS, 1, HALF)."""
    tokens = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    i = tl.arange(0, HALF)[None, None, :]
    at, inside = tokens * (DH // 2) + i, (tokens < N) & (i < DH // 2)
    return tokens, tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)


@jit
def _rope_fwd(
    qkv,  # in   (N, H + 2 Hkv, Dh)
    cos,  # in   (N, Dh/2)
    sin,  # in   (N, Dh/2)
    q,  # out  (N, H, Dh)
    k,  # out  (N, Hkv, Dh)
    v,  # out  (N, Hkv, Dh)
    row,  # elements of qkv from one token to the next
    head_row,  # and from one head to the next
    N,
    H: tl.constexpr,
    HKV: tl.constexpr,
    DH: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_SLOTS: tl.constexpr,  # H, padded to a power of 2
    KV_SLOTS: tl.constexpr,  # Hkv, likewise
    HALF: tl.constexpr,  # Dh / 2, likewise
):
    """One program TOKENS tokens."""
    tokens, c, s = _angles(cos, sin, N, DH, TOKENS, HALF)
    k_heads = qkv + H * head_row
    v_heads = k_heads + HKV * head_row
    _turn(qkv, row, head_row, q, H * DH, DH, c, s, tokens, N, H, DH, Q_SLOTS, HALF, True)
    _turn(k_heads, row, head_row, k, HKV * DH, DH, c, s, tokens, N, HKV, DH, KV_SLOTS, HALF, True)
    _turn(v_heads, row, head_row, v, HKV * DH, DH, c, s, tokens, N, HKV, DH, KV_SLOTS, HALF, False)


@jit
def _rope_bwd(
    grad_q,  # in   (N, H, Dh)
    grad_k,  # in   (N, Hkv, Dh)
    grad_v,  # in   (N, Hkv, Dh)
    cos,  # in   (N, Dh/2)
    sin,  # in   (N, Dh/2)
    grad_qkv,  # out  (N, H + 2 Hkv, Dh)
    N,
    H: tl.constexpr,
    HKV: tl.constexpr,
    DH: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_SLOTS: tl.constexpr,
    KV_SLOTS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program TOKENS tokens: the transpose of a rotation is the rotation by the opposite angle."""
    tokens, c, s = _angles(cos, sin, N, DH, TOKENS, HALF)
    row: tl.constexpr = (H + 2 * HKV) * DH
    k_heads = grad_qkv + H * DH
    v_heads = k_heads + HKV * DH
    _turn(grad_q, H * DH, DH, grad_qkv, row, DH, c, -s, tokens, N, H, DH, Q_SLOTS, HALF, True)
    _turn(grad_k, HKV * DH, DH, k_heads, row, DH, c, -s, tokens, N, HKV, DH, KV_SLOTS, HALF, True)
    _turn(grad_v, HKV * DH, DH, v_heads, row, DH, c, -s, tokens, N, HKV, DH, KV_SLOTS, HALF, False)


def _shape(heads: int, kv_heads: int, Dh: int) -> dict:
    slots = {"Q_SLOTS": heads, "KV_SLOTS": kv_heads, "HALF": Dh // 2}
    padded = {name: triton.next_power_of_2(size) for name, size in slots.items()}
    return dict(H=heads, HKV=kv_heads, DH=Dh, TOKENS=TOKENS, num_warps=2) | padded


@torch.library.custom_op("nanorlhf::rope", mutates_args=())
def _forward(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    N, merged, Dh = qkv.shape
    heads = merged - 2 * kv_heads
    q, k, v = (qkv.new_empty(N, n, Dh) for n in (heads, kv_heads, kv_heads))
    if N:
        arguments = (qkv, cos, sin, q, k, v, *qkv.stride()[:2], N)
        launch(_rope_fwd, (-(-N // TOKENS),), *arguments, **_shape(heads, kv_heads, Dh))
    return q, k, v


@torch.library.custom_op("nanorlhf::rope_backward", mutates_args=())
def _backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (N, heads, Dh), kv_heads = grad_q.shape, grad_k.shape[1]
    grad_qkv = grad_q.new_empty(N, heads + 2 * kv_heads, Dh)
    if N:
        grads = (grad.contiguous() for grad in (grad_q, grad_k, grad_v))
        launch(_rope_bwd, (-(-N // TOKENS),), *grads, cos, sin, grad_qkv, N, **_shape(heads, kv_heads, Dh))
    return grad_qkv


@_forward.register_fake
def _(qkv, cos, sin, kv_heads):
    N, merged, Dh = qkv.shape
    return tuple(qkv.new_empty(N, n, Dh) for n in (merged - 2 * kv_heads, kv_heads, kv_heads))


@_backward.register_fake
def _(grad_q, grad_k, grad_v, cos, sin):
    N, heads, Dh = grad_q.shape
    return grad_q.new_empty(N, heads + 2 * grad_k.shape[1], Dh)


def _save(ctx, inputs, output):
    _, cos, sin, _ = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx, grad_q, grad_k, grad_v):
    return _backward(grad_q, grad_k, grad_v, *ctx.saved_tensors), None, None, None


_forward.register_autograd(_gradient, setup_context=_save)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Part merged heads into q, k and v, and turn q and k by their tokens' angles; differentiable in qkv.

    args: qkv (N, H + 2 Hkv, Dh), perhaps a view whose last dimension is contiguous; cos, sin (N, Dh/2) fp32, taken as
    constant; kv_heads: Hkv
    -> q (N, H, Dh), k (N, Hkv, Dh), v (N, Hkv, Dh) in the dtype of qkv
    """
    check_heads("qkv", qkv, ("N", "H + 2 Hkv", "Dh"))
    N, merged, Dh = qkv.shape
    if Dh % 2:
        raise ValueError(f"qkv: got heads of {Dh}, expected an even number: coordinates turn in pairs")
    if not 0 < 2 * kv_heads < merged:
        raise ValueError(f"kv_heads: got {kv_heads}, expected from 1 to {(merged - 1) // 2} of {merged} merged heads")
    for name, table in (("cos", cos), ("sin", sin)):
        check_matrix(name, table, (N, Dh // 2))
        if table.dtype != wide(qkv.dtype) or table.device != qkv.device:
            raise ValueError(f"{name}: got {table.dtype} on {table.device}, expected torch.float32 on {qkv.device}")
    otherwise = cpu.rope if cpu.by_hand(qkv) else rope_reference
    return (_forward if use_triton(qkv) else otherwise)(qkv, cos, sin, kv_heads)
