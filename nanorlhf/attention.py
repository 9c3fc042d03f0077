"""Causal attention inside each sequence of a packed batch.

On a GPU in bf16 this is torch's variable-length flash attention, which reads `cu_seqlens` and
never forms a padded tensor. Elsewhere sequences of similar length are padded on the right to
the longest of them, inside this file only: behind a causal mask a real token never sees the
padding after it, so no mask tensor is needed, and the padded rows are dropped again.

With one post's numbers: docs/walk.md, station 2.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from nanorlhf.packing import Packed
from nanorlhf.pairs import PackedPairs

# What a transformer block calls: (layer index, q (N, H, Dh), k (N, Hkv, Dh), v (N, Hkv, Dh)) -> (N, H, Dh).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
BUCKET = 32  # tokens: sequences whose lengths round up to the same multiple share a rectangle


def causal(packed: Packed) -> Attend:
    """Returns the `attend` of a packed batch: each token sees itself and what came before it in its own sequence."""
    if isinstance(packed, PackedPairs):
        return _apart(packed)
    rectangles = cache(lambda: _Rectangles(packed))  # made by the first layer that needs them

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flash = (q.is_cuda or q.is_meta) and q.dtype != torch.float32  # meta: bench.plan's stand-in for a GPU
        return _varlen(q, k, v, packed) if flash else _padded(q, k, v, rectangles())

    return attend


def _apart(pairs: PackedPairs) -> Attend:
    """Each pair as its two sequences; a query's results are equal in both, and those of the first go on."""
    attend_apart = causal(pairs.apart)
    n, N = len(pairs.spread), len(pairs.tokens)
    half = sum(pairs.apart.lengths[: len(pairs.lengths)])  # tokens of all query + chosen
    sides = pairs.spread.split((half, n - half))  # no row occurs twice in either, as _Move asks
    count = torch.arange(n, device=pairs.spread.device)

    def both(x: Tensor) -> Tensor:  # (N, heads, Dh) -> (n, heads, Dh)
        return torch.cat([_Move.apply(x, rows, count[: len(rows)], len(rows)) for rows in sides])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend_apart(layer, both(q), both(k), both(v))
        return _Move.apply(out, pairs.home, count[: len(pairs.home)], N)  # 0 in the rows of the filling

    return attend


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imported here: it needs a CUDA build of torch

    # Query heads share a key/value head; nothing is expanded. torch 2.11 takes that as it is, later ones by a flag.
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if _has_flag() else {}
    cu = F.pad(packed.cu_seqlens, (0, 1), value=q.shape[0])  # (B+2,): the filling is a sequence of its own
    longest = max(packed.max_length, packed.filling)
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **grouped)  # nothing to the right


@cache
def _has_flag() -> bool:
    """Whether varlen_attn has `enable_gqa`: from torch 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


class _Rectangles:
    """Where each packed token stands in a few (b, T) rectangles of sequences of similar length, one after another."""

    def __init__(self, packed: Packed):
        buckets: dict[int, list[int]] = {}
        for index, length in enumerate(packed.lengths):
            buckets.setdefault(-(-length // BUCKET), []).append(index)
        starts = [0]
        for length in packed.lengths:
            starts.append(starts[-1] + length)
        rows, slots = [], []
        self.shapes: list[tuple[int, int]] = []  # (b, T) of each rectangle
        self.size = 0  # slots in all rectangles
        for members in buckets.values():
            T = max(packed.lengths[index] for index in members)
            for index in members:
                rows.append(torch.arange(starts[index], starts[index + 1]))
                slots.append(torch.arange(self.size, self.size + packed.lengths[index]))
                self.size += T
            self.shapes.append((len(members), T))
        device = packed.tokens.device
        self.rows = torch.cat(rows).to(device)  # (n,) packed row of each token: all but the filling
        self.slots = torch.cat(slots).to(device)  # (n,) its slot in the rectangles
        self.N = packed.tokens.shape[0]


def _padded(q: Tensor, k: Tensor, v: Tensor, rectangles: _Rectangles) -> Tensor:
    r = rectangles
    padded = [_Move.apply(x, r.rows, r.slots, r.size).split([b * T for b, T in r.shapes]) for x in (q, k, v)]
    outs = []
    for (b, T), *qkv in zip(r.shapes, *padded, strict=True):
        q, k, v = (x.view(b, T, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (b, H or Hkv, T, Dh)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out.transpose(1, 2).reshape(b * T, *out.shape[1::2]))  # (b*T, H, Dh)
    return _Move.apply(torch.cat(outs), r.slots, r.rows, r.N)  # (N, H, Dh), 0 in the rows of the filling


class _Move(torch.autograd.Function):
    """out[target] = x[source] in zeros (size, ...). No row is taken twice, so its backward is the move back."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.size = x.shape[0]
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, target, x.index_select(0, source))

    @staticmethod
    def backward(ctx, grad: Tensor):
        source, target = ctx.saved_tensors
        moved = grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, source, grad.index_select(0, target))
        return moved, None, None, None
