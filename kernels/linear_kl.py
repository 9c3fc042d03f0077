"""Exact KL divergence between two language-model heads over the whole vocabulary, without the logits of either.

    z = h W^T / T,  x = g U^T / T       h, g (M, D) hidden states; W, U (V, D) heads of policy and reference
    KL(p || q) = sum_v p_v (z_v - x_v) - lse(z) + lse(x)                     p = softmax(z), q = softmax(x)

Two logit tensors of a PPO batch are 7 GB in fp32, and naive code makes ten passes over them. On Hopper a
matrix kernel holds a tile of each in registers, one after the other, and keeps five numbers a row; a second
kernel merges the tiles. Elsewhere: chunks of both logits and the row kernel of `kl`. For scoring, without gradient.
"""

import torch
from torch import Tensor

from kernels.checks import check_head, check_matrix, check_temperature
from kernels.kl import kl, kl_reference
from kernels.linear import linear_fp32, mm_wide
from kernels.linear_logprob import descriptor, tile_logits, tile_of
from kernels.runtime import (
    INTERPRETED,
    LN2,
    MASKED,
    chunks,
    jit,
    launch,
    log2_scale,
    tl,
    triton,
    use_tiles,
    use_triton,
    wide,
)

# Two tiles of fp32 logits at once: half as wide as linear_logprob's, or registers spill.
TILE = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=16, num_warps=8, num_stages=3)
if INTERPRETED:
    TILE |= dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, GROUP=2)


def linear_kl_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, with all logits at once."""
    return kl_reference(linear_fp32(hidden, weight), linear_fp32(ref_hidden, ref_weight), labels, temperature)


@jit
def _tile_kl(
    hidden, weight,  # in   (M, D) and (V, D) of p, descriptors
    ref_hidden, ref_weight,  # in   of q
    labels,  # in   (M,) int64
    tops, sums,  # out  (M, tiles): maximum m of p's raw logits, and sum e = sum 2^((z - m) scale)
    ref_tops, ref_sums,  # out  (M, tiles): of q's
    gaps,  # out  (M, tiles): sum e (z - x), raw
    label_logits, ref_label_logits,  # out  (M,)
    M, scale, V: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a tile."""
    row_tile, vocab_tile = tile_of(tl.program_id(0), M, V, BLOCK_M, BLOCK_N, GROUP)
    m, v = row_tile * BLOCK_M, vocab_tile * BLOCK_N
    z = tile_logits(hidden, weight, m, v, V, D, BLOCK_M, BLOCK_N, BLOCK_K)
    x = tile_logits(ref_hidden, ref_weight, m, v, V, D, BLOCK_M, BLOCK_N, BLOCK_K)
    rows = m + tl.arange(0, BLOCK_M)
    inside = rows < M
    y = tl.load(labels + rows, mask=inside, other=-1) - v
    at_label = tl.arange(0, BLOCK_N)[None, :] == y[:, None]
    here = inside & (y >= 0) & (y < BLOCK_N)
    tl.store(label_logits + rows, tl.sum(tl.where(at_label, z, 0.0), axis=1), mask=here)
    tl.store(ref_label_logits + rows, tl.sum(tl.where(at_label, x, 0.0), axis=1), mask=here)
    tiles: tl.constexpr = (V + BLOCK_N - 1) // BLOCK_N
    slot = rows.to(tl.int64) * tiles + vocab_tile
    top = tl.max(z, axis=1)
    e = tl.exp2((z - top[:, None]) * scale)
    tl.store(tops + slot, top, mask=inside)
    tl.store(sums + slot, tl.sum(e, axis=1), mask=inside)
    tl.store(gaps + slot, tl.sum(e * (z - x), axis=1), mask=inside)  # past the vocabulary both are MASKED: gap 0
    ref_top = tl.max(x, axis=1)
    tl.store(ref_tops + slot, ref_top, mask=inside)
    tl.store(ref_sums + slot, tl.sum(tl.exp2((x - ref_top[:, None]) * scale), axis=1), mask=inside)


@jit
def _merge(
    tops, sums, ref_tops, ref_sums, gaps,  # in   (M, TILES) each
    label_logits, ref_label_logits,  # in   (M,) each
    kls, logprobs, ref_logprobs,  # out  (M,) each
    scale, TILES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    at = row.to(tl.int64) * TILES + slots
    there = slots < TILES
    z = tl.load(tops + at, mask=there, other=MASKED)
    x = tl.load(ref_tops + at, mask=there, other=MASKED)
    z_top = tl.max(z, axis=0)
    x_top = tl.max(x, axis=0)
    e = tl.exp2((z - z_top) * scale)
    s = tl.sum(tl.load(sums + at, mask=there, other=0.0) * e, axis=0)
    gap = tl.sum(tl.load(gaps + at, mask=there, other=0.0) * e, axis=0) / s
    log2s = tl.log2(s)
    ref_s = tl.load(ref_sums + at, mask=there, other=0.0) * tl.exp2((x - x_top) * scale)
    ref_log2s = tl.log2(tl.sum(ref_s, axis=0))
    tl.store(kls + row, ((gap - (z_top - x_top)) * scale - log2s + ref_log2s) * LN2)
    tl.store(logprobs + row, ((tl.load(label_logits + row) - z_top) * scale - log2s) * LN2)
    tl.store(ref_logprobs + row, ((tl.load(ref_label_logits + row) - x_top) * scale - ref_log2s) * LN2)


def _tiles(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    M, D = hidden.shape
    V = weight.shape[0]
    tiles = -(-V // TILE["BLOCK_N"])
    scale = log2_scale(temperature)
    matrices = []
    for h, w in ((hidden, weight), (ref_hidden, ref_weight)):
        matrices.append(descriptor(h, TILE["BLOCK_M"], TILE["BLOCK_K"]))
        matrices.append(descriptor(w, TILE["BLOCK_N"], TILE["BLOCK_K"]))
    partials = [hidden.new_empty(M, tiles, dtype=torch.float32) for _ in range(5)]
    label_logits = [hidden.new_full((M,), float("nan"), dtype=torch.float32) for _ in range(2)]
    grid = (-(-M // TILE["BLOCK_M"]) * tiles,)
    launch(_tile_kl, grid, *matrices, labels, *partials, *label_logits, M, scale, V=V, D=D, **TILE)
    outputs = tuple(torch.empty_like(label_logits[0]) for _ in range(3))
    slots = triton.next_power_of_2(tiles)
    launch(_merge, (M,), *partials, *label_logits, *outputs, scale, TILES=tiles, SLOTS=slots)
    return outputs


def _chunks(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    M, V = hidden.shape[0], weight.shape[0]
    outputs = tuple(hidden.new_empty(M, dtype=wide(hidden.dtype)) for _ in range(3))
    slices = chunks(M, V)
    size = slices[0].stop if slices else 0
    buffer, ref_buffer = (hidden.new_empty(size, V, dtype=wide(hidden.dtype)) for _ in range(2))
    for rows in slices:
        n = rows.stop - rows.start
        logits = mm_wide(hidden[rows], weight.T, out=buffer[:n])
        ref_logits = mm_wide(ref_hidden[rows], ref_weight.T, out=ref_buffer[:n])
        for whole, part in zip(outputs, kl(logits, ref_logits, labels[rows], temperature), strict=True):
            whole[rows] = part
    return outputs


@torch.library.custom_op("nanorlhf::linear_kl", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = hidden.shape[0] and use_tiles(hidden, weight) and use_tiles(ref_hidden, ref_weight)
    return (_tiles if tiles else _chunks)(hidden, weight, ref_hidden, ref_weight, labels, temperature)


@_forward.register_fake
def _(hidden, weight, ref_hidden, ref_weight, labels, temperature):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=wide(hidden.dtype)) for _ in range(3))


@torch.no_grad()
def linear_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(policy || reference) in nats over the whole vocabulary, and both log-probs of each label; no gradient.

    args: hidden (M, D), weight (V, D) of the policy; ref_hidden (M, D), ref_weight (V, D) of the reference, same
    dtype; labels (M,) int64; temperature > 0
    -> kl, logprobs, ref_logprobs: (M,) fp32 each
    """
    check_temperature(temperature)
    check_head(hidden, weight, labels)
    check_matrix("ref_hidden", ref_hidden, tuple(hidden.shape), like=hidden)
    check_matrix("ref_weight", ref_weight, tuple(weight.shape), like=hidden)
    operands = hidden, weight, ref_hidden, ref_weight, labels, temperature
    return _forward(*operands) if use_triton(hidden) else _chunks(*operands)
