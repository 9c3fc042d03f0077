"""Causal attention inside each sequence of a packed batch.

On a GPU in bf16 or fp16 this is torch's variable-length flash attention, which reads `cu_seqlens` and never forms a padded
tensor. Elsewhere the sequences are padded on the right inside this file only: behind a causal mask a real token never sees
the padding after it, so no mask tensor is needed, and the padded rows are dropped again.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanorlhf.packing import Packed

# What a transformer block calls: (layer index, q (N, H, Dh), k (N, Hkv, Dh), v (N, Hkv, Dh)) -> (N, H, Dh).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal(packed: Packed) -> Attend:
    """Returns the `attend` of a packed batch: each token sees itself and what came before it in its own sequence."""
    if packed.tokens.is_cuda:
        return lambda layer, q, k, v: _varlen(q, k, v, packed) if q.dtype != torch.float32 else _padded(q, k, v, packed)
    return lambda layer, q, k, v: _padded(q, k, v, packed)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imported here: it needs a CUDA build of torch

    group = q.shape[1] // k.shape[1]  # query heads for each key/value head
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (N, H, Dh)
    cu, longest = packed.cu_seqlens, packed.max_length
    return varlen_attn(
        q, k, v, cu, cu, longest, longest, window_size=(-1, 0)
    )  # everything to the left, nothing to the right


def _padded(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    B, T = len(packed.lengths), packed.max_length
    starts = packed.cu_seqlens[:-1].long()
    lengths = packed.cu_seqlens[1:].long() - starts
    sequence = torch.repeat_interleave(torch.arange(B, device=q.device), lengths, output_size=q.shape[0])
    slots = sequence * T + packed.positions  # (N,) where token n stands in the (B, T) rectangle
    q, k, v = (
        _Pad.apply(x, slots, B * T).view(B, T, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
    )  # (B, heads, T, Dh)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])  # (B, H, T, Dh)
    return _Unpad.apply(out.transpose(1, 2).reshape(B * T, *out.shape[1::2]), slots)  # (N, H, Dh)


class _Pad(torch.autograd.Function):
    """Rows x (N, ...) to their slots in zeros (size, ...). No slot is taken twice, so the backward is a plain gather."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of _Pad: the rows at `slots`. Backward puts them back into zeros (no atomics, no accumulation)."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, slots, grad), None
