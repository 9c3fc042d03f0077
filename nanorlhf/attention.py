"""Causal attention inside each sequence of a packed batch.

On a GPU in bf16 this is torch's variable-length flash attention, which reads `cu_seqlens` and
never forms a padded tensor. Elsewhere sequences of similar length are padded on the right to
the longest of them, inside this file only: behind a causal mask a real token never sees the
padding after it, so no mask tensor is needed, and the padded rows are dropped again. Only a
pair of summaries, which is one sequence here, needs a mask: the second must not see the first.

With one post's numbers: docs/walk.md, station 2.
"""

from collections.abc import Callable
from functools import cache, partial
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from nanorlhf.packing import Packed
from nanorlhf.pairs import PackedPairs

# What a transformer block calls: (layer index, q (N, H, Dh), k (N, Hkv, Dh), v (N, Hkv, Dh), read) -> (N, H, Dh), or
# with `read` (n,) those rows of it alone, (n, H, Dh).
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Tensor]
BUCKET = 32  # tokens: sequences whose lengths round up to the same multiple share a rectangle


def causal(packed: Packed) -> Attend:
    """Returns the `attend` of a packed batch: each token sees itself and what came before it in its own sequence, but a
    rejected summary does not see the chosen one."""
    rectangles = cache(lambda: _Rectangles(packed))  # made by the first layer that needs them
    varlen = _varlen_pairs(packed) if isinstance(packed, PackedPairs) else partial(_varlen, packed=packed)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, read: Tensor | None) -> Tensor:
        flash = (q.is_cuda or q.is_meta) and q.dtype != torch.float32  # meta: bench.plan's stand-in for a GPU
        return rows(varlen(q, k, v) if flash else _padded(q, k, v, rectangles()), read)

    return attend


def rows(x: Tensor, read: Tensor | None) -> Tensor:
    """(N, ...) -> the rows `read` (n,) of it, (n, ...); all of them for None."""
    return x if read is None else x.index_select(0, read)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imported here: it needs a CUDA build of torch

    # Query heads share a key/value head; nothing is expanded. torch 2.11 takes that as it is, later ones by a flag.
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if _has_flag() else {}
    cu = F.pad(packed.cu_seqlens, (0, 1), value=q.shape[0])  # (B+2,): the filling is a sequence of its own
    longest = max(packed.max_length, packed.filling)
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **grouped)  # nothing to the right


def _varlen_pairs(pairs: PackedPairs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Each pair as its two sequences; a query's results are equal in both, and those of the first go on."""
    n, N = len(pairs.spread), len(pairs.tokens)
    half = sum(pairs.apart.lengths[: len(pairs.lengths)])  # tokens of all query + chosen
    sides = pairs.spread.split((half, n - half))  # no row occurs twice in either, as _Move asks
    count = torch.arange(n, device=pairs.spread.device)

    def both(x: Tensor) -> Tensor:  # (N, heads, Dh) -> (n, heads, Dh)
        return torch.cat([_Move.apply(x, rows, count[: len(rows)], len(rows)) for rows in sides])

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _varlen(both(q), both(k), both(v), pairs.apart)
        return _Move.apply(out, pairs.home, count[: len(pairs.home)], N)  # 0 in the rows of the filling

    return varlen


@cache
def _has_flag() -> bool:
    """Whether varlen_attn has `enable_gqa`: from torch 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


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


class _Rectangles:
    """Where each packed token stands in a few (b, T) rectangles of sequences of similar length, one after another.

    Each of a rectangle's slots shows a token's row, and those behind the end of a sequence any row: nobody reads what
    they get. A pair is one sequence here, with a mask: its second summary does not see the first.
    """

    def __init__(self, packed: Packed):
        device, self.N = packed.tokens.device, packed.tokens.shape[0]
        buckets: dict[int, list[int]] = {}
        for index, length in enumerate(packed.lengths):
            buckets.setdefault(-(-length // BUCKET), []).append(index)
        self.shapes: list[tuple[int, int]] = []  # (b, T) of each rectangle
        self.masks: list[Tensor | None] = []  # (b, 1, T, T) bool: what a token sees, if it is not all before it
        self.size = 0  # slots in all rectangles
        first = [0] * len(packed.lengths)  # slot of each sequence's first token
        for members in buckets.values():
            T = max(packed.lengths[index] for index in members)
            for index in members:
                first[index] = self.size
                self.size += T
            self.shapes.append((len(members), T))
            self.masks.append(_seen(packed, members, T) if isinstance(packed, PackedPairs) else None)
        slots = [torch.arange(at, at + length) for at, length in zip(first, packed.lengths, strict=True)]
        self.slots = torch.cat(slots).to(device)  # (n,) the slot of each packed token: all but the filling
        self.rows = torch.zeros(self.size, dtype=torch.int64, device=device)  # (size,) the row that a slot shows
        self.rows[self.slots] = torch.arange(len(self.slots), device=device)


def _seen(pairs: PackedPairs, members: list[int], T: int) -> Tensor:
    """(b, 1, T, T) bool: token i sees token j of query, chosen, rejected unless i is in rejected and j in chosen."""
    apart, device = pairs.apart.lengths, pairs.tokens.device
    end = torch.tensor([apart[i] for i in members], device=device).view(-1, 1, 1)  # of query + chosen
    second = torch.tensor([pairs.lengths[i] for i in members], device=device).view(-1, 1, 1) - end  # length of rejected
    query = torch.tensor([apart[len(pairs.lengths) + i] for i in members], device=device).view(-1, 1, 1) - second
    i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    return ((j <= i) & ~((i >= end) & (j >= query) & (j < end)))[:, None]


def _from_slots(slots: Tensor, of_rows: Tensor, N: int) -> Tensor:
    """(size, ...) -> (N, ...), the slot of each row of sequences being given: 0 in the rows of the filling."""
    rows, n = slots.new_empty(N, *slots.shape[1:]), len(of_rows)
    torch.index_select(slots, 0, of_rows, out=rows[:n])
    rows[n:] = 0
    return rows


class _ToSlots(torch.autograd.Function):
    """(N, ...) -> (size, ...). What a slot behind the end of a sequence is given reaches no result, and no gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor, r: _Rectangles) -> Tensor:
        ctx.save_for_backward(r.slots)
        ctx.N = r.N
        return rows.index_select(0, r.rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _from_slots(grad, *ctx.saved_tensors, ctx.N), None


class _FromSlots(torch.autograd.Function):
    """(size, ...) -> (N, ...). The gradient of slots that nobody reads is 0: as queries they move no key."""

    @staticmethod
    def forward(ctx, slots: Tensor, r: _Rectangles) -> Tensor:
        ctx.save_for_backward(r.slots)
        ctx.size = r.size
        return _from_slots(slots, r.slots, r.N)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (of_rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, of_rows, grad[: len(of_rows)]), None


def _padded(q: Tensor, k: Tensor, v: Tensor, rectangles: _Rectangles) -> Tensor:
    sizes = [b * T for b, T in rectangles.shapes]
    padded = [_ToSlots.apply(x, rectangles).split(sizes) for x in (q, k, v)]
    outs = []
    for (b, T), mask, *qkv in zip(rectangles.shapes, rectangles.masks, *padded, strict=True):
        q, k, v = (x.view(b, T, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (b, H or Hkv, T, Dh)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        outs.append(out.transpose(1, 2).reshape(b * T, *out.shape[1::2]))  # (b*T, H, Dh)
    return _FromSlots.apply(torch.cat(outs) if len(outs) > 1 else outs[0], rectangles)  # (N, H, Dh)
