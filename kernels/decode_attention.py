"""Attention of one new token a sequence over a static cache of keys and values.

    z_s = q . k_s / sqrt(Dh)            s = 0 .. positions[b]: the slots that sequence b has filled, its own included
    out = sum_s p_s v_s                 p = softmax(z)

q (B, H, Dh), keys and values (B, S, Hkv, Dh); H / Hkv query heads share a key/value head. A decoding step is bound by
reading the cache: at Llama-3.2-1B's sizes (Hkv 8, Dh 64, bf16) a slot is 2 KB a layer. With a mask all S slots of every
sequence are read, the empty ones too; the kernel reads positions[b] + 1 and each once, for all query heads that share
it. It learns the bound on the device, so there is no sync with the host and one captured CUDA graph serves every step.

One program takes one key/value head of one sequence. Where these are too few to fill a card (a small batch), the slots
of each are split among several programs, each of which leaves the attention output of its own part and the part's
logsumexp; the whole is their mean, weighted by the softmax of the logsumexps.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_heads, check_positions
from kernels.cpu import by_hand
from kernels.runtime import EMPTY, INTEL, INTERPRETED, MASKED, compute_type, jit, launch, tl, triton, use_triton, wide

BLOCK = 16 if INTERPRETED else 64  # slots at a time
PROGRAMS = 264  # enough for a card: two on each of Hopper's 132 multiprocessors


def decode_attention_reference(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """The specification."""
    visible = _visible(keys, positions)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # (B, Hkv, S, Dh)
    # The H / Hkv query heads that share a key head stand in the place of a query length: no copy of the cache.
    grouped = q.unflatten(1, (keys.shape[1], -1))  # (B, Hkv, H / Hkv, Dh)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None, :])
    return out.flatten(1, 2)


def _visible(keys: Tensor, positions: Tensor) -> Tensor:
    """(B, S) bool: the slots that each sequence has filled."""
    return torch.arange(keys.shape[1], device=keys.device) <= positions[:, None]


def by_bags(x: Tensor) -> bool:
    """Whether attention over a cache like x goes by `_bags`, which reads keys best with the slots innermost."""
    return by_hand(x) and not INTEL


def _bags(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """The same on a CPU that is not Intel's, as weighted sums of rows: z = sum_d q_d K^T[d], out = sum_s p_s V[s].

    Torch calls that an embedding bag, and its loop fetches the next rows while it adds: a step reads more than a core's
    own cache holds. Torch's fused attention asks MKL for one small product after another, and each waits for memory.
    """
    (B, H, Dh), (S, Hkv) = q.shape, keys.shape[1:3]
    key_rows = keys.permute(0, 2, 3, 1).reshape(B * Hkv * Dh, S)  # a view, if slots stand innermost
    value_rows = values.transpose(1, 2).reshape(B * Hkv * S, Dh)
    z = _bag_sums(key_rows, q.reshape(B * H, Dh), H // Hkv).view(B, H, S)
    mask = torch.where(_visible(keys, positions), 0.0, -math.inf)  # (B, S)
    p = torch.add(mask[:, None], z, alpha=1 / math.sqrt(Dh)).softmax(dim=-1)
    return _bag_sums(value_rows, p.view(B * H, S), H // Hkv).view(B, H, Dh)


def _bag_sums(rows: Tensor, weights: Tensor, shared: int) -> Tensor:
    """rows (n / shared * k, m), k after k; weights (n, k) -> (n, m): sums of k rows, which `shared` bags share."""
    which, first = _bags_of(*weights.shape, shared)
    return torch.embedding_bag(rows, which, first, mode=0, per_sample_weights=weights.view(-1))[0]  # mode 0: the sum


@lru_cache(maxsize=8)
def _bags_of(n: int, k: int, shared: int) -> tuple[Tensor, Tensor]:
    """(n k,) int32: the row of each weight; (n,) int32: where a bag begins."""
    which = torch.arange(n)[:, None] // shared * k + torch.arange(k)
    return which.flatten().int(), torch.arange(0, n * k, k, dtype=torch.int32)


@jit
def _decode(
    q,  # in   (B, H, Dh)
    keys,  # in   (B, S, Hkv, Dh)
    values,  # in   (B, S, Hkv, Dh)
    positions,  # in   (B,) int64
    outs,  # out  (B, H, SPLITS, Dh)
    lses,  # out  (B, H, SPLITS) base 2; left alone where SPLITS is 1
    q_row, q_head,  # elements from one sequence to the next, and from one head to the next
    key_row, key_slot, key_head,
    value_row, value_slot, value_head,
    S,
    scale,  # log2(e) / sqrt(Dh)
    GROUP: tl.constexpr,  # H / Hkv
    DH: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP, padded to what the tensor cores take
    WIDTH: tl.constexpr,  # DH, padded to a power of 2
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program a sequence, key/value head and part of its slots: a running (maximum, sum, weighted values)."""
    b = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    slots_filled = tl.minimum(tl.load(positions + b) + 1, S)  # never past the cache, whatever `positions` says
    part = tl.cdiv(tl.cdiv(slots_filled, BLOCK), SPLITS) * BLOCK
    begin = split * part
    end = tl.minimum(begin + part, slots_filled)

    rows = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inside = d < DH
    live = (rows < GROUP)[:, None] & inside[None, :]
    heads = kv_head * GROUP + rows
    query = tl.load(q + b * q_row + heads[:, None] * q_head + d[None, :], mask=live, other=0.0)
    key = keys + b * key_row + kv_head * key_head
    value = values + b * value_row + kv_head * value_head

    top = tl.full([ROWS], EMPTY, COMPUTE)
    total = tl.zeros([ROWS], COMPUTE)
    out = tl.zeros([ROWS, WIDTH], COMPUTE)
    for start in range(begin, end, BLOCK):
        slots = (start + tl.arange(0, BLOCK)).to(tl.int64)  # times a stride it may pass 2^31
        visible = slots < end
        k = tl.load(
            key + slots[None, :] * key_slot + d[:, None], mask=visible[None, :] & inside[:, None], other=0.0
        )  # (WIDTH, BLOCK)
        z = tl.dot(query, k, input_precision="ieee", out_dtype=COMPUTE) * scale
        z = tl.where(visible[None, :], z, MASKED)
        higher = tl.maximum(top, tl.max(z, axis=1))
        shrink = tl.exp2(top - higher)
        e = tl.exp2(z - higher[:, None])
        v = tl.load(
            value + slots[:, None] * value_slot + d[None, :], mask=visible[:, None] & inside[None, :], other=0.0
        )  # (BLOCK, WIDTH)
        total = total * shrink + tl.sum(e, axis=1)
        out = out * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision="ieee", out_dtype=COMPUTE)
        top = higher

    at = (b * tl.num_programs(1) + kv_head) * GROUP + rows  # row of (B, H)
    if SPLITS > 1:  # a part may be empty: its maximum is still EMPTY, and so it will weigh nothing
        total = tl.where(total == 0, 1.0, total)
        tl.store(lses + at * SPLITS + split, top + tl.log2(total), mask=rows < GROUP)
    out = (out / total[:, None]).to(outs.dtype.element_ty)
    tl.store(outs + (at * SPLITS + split)[:, None] * DH + d[None, :], out, mask=live)


@jit
def _merge_splits(
    parts,  # in   (B, H, SPLITS, Dh)
    lses,  # in   (B, H, SPLITS) base 2
    outs,  # out  (B, H, Dh)
    DH: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,  # SPLITS, padded to a power of 2
    WIDTH: tl.constexpr,
):
    """One program a sequence and query head: out = sum_i softmax(lse)_i part_i."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SLOTS)
    d = tl.arange(0, WIDTH)
    lse = tl.load(lses + row * SPLITS + splits, mask=splits < SPLITS, other=MASKED)
    e = tl.exp2(lse - tl.max(lse, axis=0))
    inside = (splits < SPLITS)[:, None] & (d < DH)[None, :]
    part = tl.load(parts + (row * SPLITS + splits)[:, None] * DH + d[None, :], mask=inside, other=0.0)
    out = tl.sum(part * e[:, None], axis=0) / tl.sum(e, axis=0)
    tl.store(outs + row * DH + d, out.to(outs.dtype.element_ty), mask=d < DH)


def splits_of(programs: int, slots: int) -> int:
    """Parts into which each sequence's slots are split: a matter of shapes alone, so equal shapes give equal bits."""
    return max(1, min(PROGRAMS // programs, -(-slots // BLOCK)))


@torch.library.custom_op("nanorlhf::decode_attention", mutates_args=())
def _forward(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    (B, H, Dh), (_, S, Hkv, _) = q.shape, keys.shape
    out = q.new_empty(B, H, Dh)
    if not B:
        return out
    splits, width = splits_of(B * Hkv, S), max(16, triton.next_power_of_2(Dh))
    parts = out if splits == 1 else q.new_empty(B, H, splits, Dh, dtype=wide(q.dtype))
    lses = q.new_empty(B, H, splits, dtype=wide(q.dtype))
    strides = (*q.stride()[:2], *keys.stride()[:3], *values.stride()[:3])
    group = H // Hkv
    constants = dict(GROUP=group, DH=Dh, SPLITS=splits, ROWS=max(16, triton.next_power_of_2(group)), WIDTH=width)
    arguments = (q, keys, values, positions, parts, lses, *strides, S, 1 / (math.sqrt(Dh) * math.log(2)))
    launch(_decode, (B, Hkv, splits), *arguments, BLOCK=BLOCK, COMPUTE=compute_type(q), **constants)
    if splits > 1:
        slots = triton.next_power_of_2(splits)
        launch(_merge_splits, (B * H,), parts, lses, out, DH=Dh, SPLITS=splits, SLOTS=slots, WIDTH=width)
    return out


@_forward.register_fake
def _(q, keys, values, positions):
    return q.new_empty(q.shape)


@torch.no_grad()
def decode_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of one token a sequence, at slot positions[b] of the cache, over slots 0 to positions[b]; no gradient.

    args: q (B, H, Dh); keys, values (B, S, Hkv, Dh) in the dtype of q, H a multiple of Hkv; each may be a view whose
    last dimension is contiguous (of keys the slots, `by_bags`); positions (B,) int64 from 0 to S - 1
    -> (B, H, Dh) in the dtype of q

    What the slots behind positions[b] hold is never read on a GPU, and must be finite on a CPU.
    """
    check_heads("q", q, ("B", "H", "Dh"))
    B, H, Dh = q.shape
    check_heads("keys", keys, (B, "S", "Hkv", Dh), like=q, inner=(-1, 1) if by_bags(q) else (-1,))
    check_heads("values", values, tuple(keys.shape), like=q)
    if H % keys.shape[2]:
        raise ValueError(f"keys: got {keys.shape[2]} heads, expected a divisor of the {H} heads of q")
    check_positions(positions, B, keys.shape[1], like=q)
    if use_triton(q):
        return _forward(q, keys, values, positions)
    return (_bags if by_bags(q) else decode_attention_reference)(q, keys, values, positions)
