"""The next token and its log-prob, straight from hidden states and the head's weight.

    z     = h W^T / T                                  h (B, D), W (V, D)
    token = min { v : sum_{w <= v} p_w > u }           p = softmax(z), u uniform in [0, 1)

Inverse-CDF sampling: one uniform number a token, so the noise of a whole rollout is a small table that depends on
(seed, episode, t) alone. The same table gives the same tokens on a CPU and on a GPU, up to rounding, in any batch and
after a resume. (The Gumbel trick draws V numbers a token, 870 million a PPO batch, and in fp32 its tail ends at 16.6.)

A decoding step is bound by reading W, 0.5 GB. On Hopper the matrix kernel of `linear_logprob` reads it once
and leaves a maximum and two sums for each tile of 128 tokens; then one program a row finds the tile in which the
cumulative sum passes u, computes its 128 logits again, and picks. No logits, no sync with the host: t is read
on the device, so one captured CUDA graph serves every step.
"""

import torch
from torch import Tensor

from kernels.checks import check_matrix, check_temperature
from kernels.cpu import by_hand
from kernels.linear import linear_fp32, mm_wide
from kernels.linear_logprob import merge_tiles, tile_stats
from kernels.logprob_entropy import forward_rows
from kernels.runtime import INTERPRETED, LN2, MASKED, jit, launch, log2_scale, tl, triton, use_tiles, use_triton, wide

# Each vocabulary tile reads all hidden states again, 0.5 MB from L2: at 64 tokens that is twice the traffic of W
# itself, at 128 as much. Three stages leave room for two programs on a multiprocessor.
TILE = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=1, num_warps=8, num_stages=3)
if INTERPRETED:
    TILE |= dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16)


def sample(probabilities: Tensor, u: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds u. (B, V), (B,) float64 -> (B,) int64.

    In float64, so that the tail of a 128k vocabulary is neither cut off nor inflated by rounding in the cumulative sum.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    # The sum is 1 up to rounding; scaling by it keeps the last token reachable.
    threshold = u[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def sample_head_reference(
    hidden: Tensor, weight: Tensor, u: Tensor, step: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The specification, with all logits."""
    logp = torch.log_softmax(linear_fp32(hidden, weight) / temperature, dim=-1)  # (B, V)
    tokens = sample(logp.exp(), u.index_select(1, step.view(1))[:, 0])
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


def _by_hand(hidden: Tensor, weight: Tensor, u: Tensor, step: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same on a CPU, by fewer passes over the logits: `sample` needs no sum of 1."""
    z = linear_fp32(hidden, weight).div_(temperature)  # (B, V)
    e = z.sub_(z.amax(dim=-1, keepdim=True)).exp()
    tokens = sample(e, u.index_select(1, step.view(1))[:, 0])
    return tokens, z.gather(1, tokens[:, None])[:, 0] - e.sum(dim=-1).log()


@jit
def _pick(
    hidden,  # in   (B, D)
    weight,  # in   (V, D)
    tops, sums, tilts,  # in   (B, TILES) each, of tile_stats
    uniforms,  # in   (B, R) fp64
    step,  # in   () int64: the column of uniforms
    tokens,  # out  (B,) int64
    logprobs,  # out  (B,)
    scale, R, V: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,  # tokens a tile
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0)
    top, s, _, shares = merge_tiles(tops, sums, tilts, row, scale, TILES, SLOTS)

    # The tile: as many lie wholly before it as have a cumulative share of at most u.
    shares = shares.to(tl.float64)
    cumulative = tl.cumsum(shares, axis=0)
    total = tl.sum(shares, axis=0)
    u = tl.load(uniforms + row * R + tl.load(step)) * total
    slots = tl.arange(0, SLOTS)
    last = tl.max(tl.where(shares > 0, slots, 0), axis=0)  # u may round up to the total
    tile = tl.minimum(tl.sum((cumulative <= u).to(tl.int32), axis=0), last)
    left = u - tl.sum(tl.where(slots < tile, shares, 0.0), axis=0)

    # The token in it.
    columns = tile * WIDTH + tl.arange(0, WIDTH)
    z = tl.zeros([WIDTH], tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(hidden + row.to(tl.int64) * D + k, mask=k < D, other=0.0).to(tl.float32)
        at = columns.to(tl.int64)[:, None] * D + k[None, :]
        w = tl.load(weight + at, mask=(columns < V)[:, None] & (k < D)[None, :], other=0.0).to(tl.float32)
        z += tl.sum(w * h[None, :], axis=1)
    z = tl.where(columns < V, z, MASKED)
    e = tl.exp2((z - top) * scale).to(tl.float64)
    left *= tl.sum(e, axis=0) / tl.sum(tl.where(slots == tile, shares, 0.0), axis=0)  # equal but for rounding
    inside = tl.arange(0, WIDTH)
    last = tl.max(tl.where(e > 0, inside, 0), axis=0)
    pick = tl.minimum(tl.sum((tl.cumsum(e, axis=0) <= left).to(tl.int32), axis=0), last)
    z_y = tl.sum(tl.where(inside == pick, z, 0.0), axis=0)
    tl.store(tokens + row, (tile * WIDTH + pick).to(tl.int64))
    tl.store(logprobs + row, ((z_y - top) * scale - tl.log2(s)) * LN2)


def _tiles(hidden: Tensor, weight: Tensor, u: Tensor, step: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    (B, D), V = hidden.shape, weight.shape[0]
    scale = log2_scale(temperature)
    partials, _ = tile_stats(hidden, weight, None, scale, TILE)
    tokens = torch.empty(B, dtype=torch.int64, device=hidden.device)
    logprobs = hidden.new_empty(B, dtype=torch.float32)
    tiles = partials[0].shape[1]
    constants = dict(V=V, D=D, TILES=tiles, SLOTS=triton.next_power_of_2(tiles), WIDTH=TILE["BLOCK_N"], BLOCK_K=128)
    arguments = (hidden, weight, *partials, u, step, tokens, logprobs, scale, u.shape[1])
    launch(_pick, (B,), *arguments, num_warps=8, **constants)
    return tokens, logprobs


def _logits(hidden: Tensor, weight: Tensor, u: Tensor, step: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = mm_wide(hidden, weight.T)  # (B, V)
    tokens = sample((logits / temperature).softmax(-1), u.index_select(1, step.view(1))[:, 0])
    return tokens, forward_rows(logits, tokens, temperature)[0]


@torch.library.custom_op("nanorlhf::sample_head", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, u: Tensor, step: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    tiles = hidden.shape[0] and use_tiles(hidden, weight)
    return (_tiles if tiles else _logits)(hidden, weight, u, step, temperature)


@_forward.register_fake
def _(hidden, weight, u, step, temperature):
    tokens = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    return tokens, hidden.new_empty(hidden.shape[0], dtype=wide(hidden.dtype))


@torch.no_grad()
def sample_head(
    hidden: Tensor, weight: Tensor, u: Tensor, step: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sample a token a row from softmax(h W^T / T), with its log-prob in nats; no gradient.

    args: hidden (B, D); weight (V, D), same dtype; u (B, R) float64, uniform in [0, 1), one number a row and step;
    step () int64, on the device: the column of u to use; temperature > 0
    -> tokens (B,) int64, logprobs (B,) fp32
    """
    check_temperature(temperature)
    check_matrix("hidden", hidden, ("B", "D"))
    check_matrix("weight", weight, ("V", hidden.shape[1]), like=hidden)
    check_matrix("u", u, (hidden.shape[0], "R"))
    if u.dtype != torch.float64 or u.device != hidden.device:
        raise ValueError(f"u: got {u.dtype} on {u.device}, expected torch.float64 on {hidden.device}")
    if step.numel() != 1 or step.dtype != torch.int64 or step.device != hidden.device:
        raise ValueError(
            f"step: got {tuple(step.shape)} {step.dtype} on {step.device}, expected one int64 on {hidden.device}"
        )
    operation = _forward if use_triton(hidden) else _by_hand if by_hand(hidden) else sample_head_reference
    return operation(hidden, weight, u, step, temperature)
