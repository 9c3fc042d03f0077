"""Log-probability of a label and entropy of the distribution, straight from hidden states and the head's weight.

    z = h W^T / T                                    logits at temperature T        h (M, D), W (V, D)
    logprob = z[y] - lse(z)
    entropy = lse(z) - sum_v softmax(z)_v z_v

The logits (M, V) are what runs out of memory at V = 128,256: 3.5 GB in fp32 for the 6,784
response positions of one PPO batch, and half a dozen copies of it in naive code. Everything
after the matmul is fp32: logits in bf16 give log-probs that are off by 0.03, against a PPO clip of 0.2.

On Hopper a matrix kernel computes a tile of 128 rows x 256 tokens and reduces it before it
leaves the registers, to a maximum and two sums a row; a second kernel merges the 501 tiles of
a row (41 MB in place of 3.5 GB). Elsewhere logits are made one chunk of rows at a time. The gradient makes
them again, chunk by chunk: dz is written in the dtype of hidden, and two matmuls finish.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.checks import check_head, check_temperature
from kernels.linear import addmm_wide, linear_fp32, mm_wide
from kernels.logprob_entropy import backward_rows, forward_rows
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

# Registers decide: a tile of fp32 logits fills 128 of each thread's 255, and 4 stages of operands 197 of 227 KB of
# shared memory. 128 rows of hidden states stay in cache while 8 such row tiles take turns on a tile of the weight.
TILE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP=16, num_warps=8, num_stages=4)
if INTERPRETED:
    TILE |= dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, GROUP=2)


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The specification: the formula above, with all logits at once."""
    logp = torch.log_softmax(linear_fp32(hidden, weight) / temperature, dim=-1)  # (M, V)
    entropy = -(logp.exp() * logp).sum(-1)  # logits of finite hidden states are finite: no 0 * inf
    return logp.gather(-1, labels[:, None])[:, 0], entropy


# --- matrix kernel ---------------------------------------------------------------------------------------------------


@jit
def tile_of(index, rows, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, vocabulary tile) of a program: GROUP row tiles take turns, so that a tile of W is read from L2."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    vocab_tiles: tl.constexpr = (V + BLOCK_N - 1) // BLOCK_N
    first = index // (GROUP * vocab_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = index % (GROUP * vocab_tiles)
    return first + within % size, within // size


@jit
def tile_logits(hidden, weight, m, v, V: tl.constexpr, D: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile of h W^T, (BLOCK_M, BLOCK_N) fp32, from row m and token v on. Past the vocabulary: MASKED.

    The copy engine fills what lies outside a matrix with 0, and exp(0) is not nothing: unmasked, the tail of the
    vocabulary would raise every log-prob's denominator.
    """
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        logits = tl.dot(hidden.load([m, k]), weight.load([v, k]).T, logits)
    if V % BLOCK_N != 0:
        logits = tl.where((v + tl.arange(0, BLOCK_N) < V)[None, :], logits, MASKED)
    return logits


@jit
def _tile_stats(
    hidden,  # in   (M, D), descriptor of (BLOCK_M, BLOCK_K) boxes
    weight,  # in   (V, D), descriptor of (BLOCK_N, BLOCK_K) boxes
    labels,  # in   (M,) int64
    tops,  # out  (M, tiles): maximum m of the raw logits of a tile
    sums,  # out  (M, tiles): sum 2^d, where d = (z - m) scale
    tilts,  # out  (M, tiles): sum 2^d d
    label_logits,  # out  (M,): z_y, by the one tile that has it
    M,
    scale,  # log2(e) / T
    V: tl.constexpr,
    D: tl.constexpr,
    WITH_LABELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a tile."""
    row_tile, vocab_tile = tile_of(tl.program_id(0), M, V, BLOCK_M, BLOCK_N, GROUP)
    z = tile_logits(hidden, weight, row_tile * BLOCK_M, vocab_tile * BLOCK_N, V, D, BLOCK_M, BLOCK_N, BLOCK_K)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    if WITH_LABELS:
        y = tl.load(labels + rows, mask=inside, other=-1).to(tl.int32) - vocab_tile * BLOCK_N
        z_y = tl.sum(tl.where(tl.arange(0, BLOCK_N)[None, :] == y[:, None], z, 0.0), axis=1)
        tl.store(label_logits + rows, z_y, mask=inside & (y >= 0) & (y < BLOCK_N))
    top = tl.max(z, axis=1)
    d = (z - top[:, None]) * scale
    e = tl.exp2(d)
    tiles: tl.constexpr = (V + BLOCK_N - 1) // BLOCK_N
    slot = rows.to(tl.int64) * tiles + vocab_tile
    tl.store(tops + slot, top, mask=inside)
    tl.store(sums + slot, tl.sum(e, axis=1), mask=inside)
    tl.store(tilts + slot, tl.sum(e * d, axis=1), mask=inside)


@jit
def merge_tiles(tops, sums, tilts, row, scale, TILES: tl.constexpr, SLOTS: tl.constexpr):
    """The tiles of one row -> maximum, sum and tilt of the row, and each tile's share of the sum, (SLOTS,)."""
    slots = tl.arange(0, SLOTS)
    at = row.to(tl.int64) * TILES + slots
    m = tl.load(tops + at, mask=slots < TILES, other=MASKED)
    s = tl.load(sums + at, mask=slots < TILES, other=0.0)
    u = tl.load(tilts + at, mask=slots < TILES, other=0.0)
    top = tl.max(m, axis=0)
    d = (m - top) * scale
    e = tl.exp2(d)
    return top, tl.sum(s * e, axis=0), tl.sum((u + s * d) * e, axis=0), s * e


@jit
def _merge(
    tops, sums, tilts,  # in   (M, TILES) each
    label_logits,  # in   (M,)
    logprobs, entropies,  # out  (M,) each
    row_tops, log2sums,  # out  (M,) each, for the backward pass
    scale, TILES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0)
    top, s, u, _ = merge_tiles(tops, sums, tilts, row, scale, TILES, SLOTS)
    log2s = tl.log2(s)
    tl.store(logprobs + row, ((tl.load(label_logits + row) - top) * scale - log2s) * LN2)
    tl.store(entropies + row, (log2s - u / s) * LN2)
    tl.store(row_tops + row, top)
    tl.store(log2sums + row, log2s)


def descriptor(matrix: Tensor, rows: int, columns: int):
    """How the copy engine reads a row-major matrix: in boxes of (rows, columns), with 0 outside."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def tile_stats(
    hidden: Tensor, weight: Tensor, labels: Tensor | None, scale: float, tile: dict
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Launch the matrix kernel -> (tops, sums, tilts), (M, tiles) fp32 each; label logits (M,)."""
    M, D = hidden.shape
    V = weight.shape[0]
    partials = tuple(hidden.new_empty(M, -(-V // tile["BLOCK_N"]), dtype=torch.float32) for _ in range(3))
    label_logits = hidden.new_full((M,), float("nan"), dtype=torch.float32)  # stays where a label is no token
    matrices = (
        descriptor(hidden, tile["BLOCK_M"], tile["BLOCK_K"]),
        descriptor(weight, tile["BLOCK_N"], tile["BLOCK_K"]),
    )
    grid = (-(-M // tile["BLOCK_M"]) * partials[0].shape[1],)
    anything = label_logits if labels is None else labels
    constants = dict(V=V, D=D, WITH_LABELS=labels is not None, **tile)
    launch(_tile_stats, grid, *matrices, anything, *partials, label_logits, M, scale, **constants)
    return partials, label_logits


def _forward_tiles(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, ...]:
    scale = log2_scale(temperature)
    partials, label_logits = tile_stats(hidden, weight, labels, scale, TILE)
    outputs = tuple(torch.empty_like(label_logits) for _ in range(4))
    tiles = partials[0].shape[1]
    slots = triton.next_power_of_2(tiles)
    launch(_merge, hidden.shape[:1], *partials, label_logits, *outputs, scale, TILES=tiles, SLOTS=slots)
    return outputs


# --- chunks of logits ------------------------------------------------------------------------------------------------


def _forward_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, ...]:
    M, V = hidden.shape[0], weight.shape[0]
    outputs = tuple(hidden.new_empty(M, dtype=wide(hidden.dtype)) for _ in range(4))
    slices = chunks(M, V)
    buffer = hidden.new_empty(slices[0].stop if slices else 0, V, dtype=wide(hidden.dtype))
    for rows in slices:
        logits = mm_wide(hidden[rows], weight.T, out=buffer[: rows.stop - rows.start])
        logprobs, entropy, _, tops, log2sums = forward_rows(logits, labels[rows], temperature)
        for whole, part in zip(outputs, (logprobs, entropy, tops, log2sums), strict=True):
            whole[rows] = part
    return outputs


@torch.library.custom_op("nanorlhf::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> logprobs, entropy, and for the backward pass tops, log2sums"""
    if hidden.shape[0] and use_tiles(hidden, weight):
        return _forward_tiles(hidden, weight, labels, temperature)
    return _forward_chunks(hidden, weight, labels, temperature)


@torch.library.custom_op("nanorlhf::linear_logprob_backward", mutates_args=())
def _backward(
    hidden: Tensor, weight: Tensor, labels: Tensor, entropy: Tensor, tops: Tensor, log2sums: Tensor,
    grad_logprobs: Tensor, grad_entropy: Tensor, temperature: float, of_hidden: bool, of_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> gradients of hidden and weight; empty where not asked for"""
    M, V = hidden.shape[0], weight.shape[0]
    grad_hidden = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=wide(weight.dtype)) if of_weight else weight.new_empty(0)
    slices = chunks(M, V)
    size = slices[0].stop if slices else 0
    logits_buffer, grad_buffer = hidden.new_empty(size, V, dtype=wide(hidden.dtype)), hidden.new_empty(size, V)
    zeros = torch.zeros_like(entropy)
    for rows in slices:
        n = rows.stop - rows.start
        logits = mm_wide(hidden[rows], weight.T, out=logits_buffer[:n])
        saved = tuple(x[rows] for x in (entropy, tops, log2sums))
        grads = tuple(x[rows] for x in (grad_logprobs, grad_entropy, zeros))
        backward_rows(logits, labels[rows], saved, grads, temperature, grad_buffer[:n])
        if of_hidden:
            torch.mm(grad_buffer[:n], weight, out=grad_hidden[rows])  # dh = dz W
        if of_weight:
            addmm_wide(grad_weight, grad_buffer[:n].T, hidden[rows], first=rows.start == 0)  # dW += dz^T h
    return grad_hidden, grad_weight.to(weight.dtype)


@_forward.register_fake
def _(hidden, weight, labels, temperature):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=wide(hidden.dtype)) for _ in range(4))


@_backward.register_fake
def _(hidden, weight, labels, entropy, tops, log2sums, grad_logprobs, grad_entropy, temperature, of_hidden, of_weight):
    return (
        torch.empty_like(hidden) if of_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if of_weight else weight.new_empty(0),
    )


def _save(ctx, inputs, output):
    hidden, weight, labels, ctx.temperature = inputs
    _, entropy, tops, log2sums = output
    ctx.mark_non_differentiable(tops, log2sums)
    ctx.set_materialize_grads(False)  # None for what has no gradient, and no zeros
    ctx.save_for_backward(hidden, weight, labels, entropy, tops, log2sums)


def _gradient(ctx, grad_logprobs, grad_entropy, *_):
    wanted, entropy = ctx.needs_input_grad[:2], ctx.saved_tensors[3]
    upstream = (torch.zeros_like(entropy) if g is None else g.contiguous() for g in (grad_logprobs, grad_entropy))
    grads = _backward(*ctx.saved_tensors, *upstream, ctx.temperature, *wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None


_forward.register_autograd(_gradient, setup_context=_save)


def linear_logprob(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy in nats at a temperature; differentiable in hidden and weight.

    args: hidden (M, D); weight (V, D), same dtype; labels (M,) int64; temperature > 0
    -> logprobs (M,) fp32, entropy (M,) fp32
    """
    check_temperature(temperature)
    check_head(hidden, weight, labels)
    if use_triton(hidden):
        logprobs, entropy, _, _ = _forward(hidden, weight, labels, temperature)
        return logprobs, entropy
    slices = chunks(hidden.shape[0], weight.shape[0])
    if len(slices) <= 1:
        return linear_logprob_reference(hidden, weight, labels, temperature)
    parts = [
        checkpoint(linear_logprob_reference, hidden[rows], weight, labels[rows], temperature, use_reentrant=False)
        for rows in slices
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
