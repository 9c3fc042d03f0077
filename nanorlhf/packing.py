"""Packing: a batch of token lists of different lengths becomes one row of N tokens, with no padding in it.

    sequences  [[5, 6, 7], [8, 9]]
    tokens     [5, 6, 7, 8, 9]        (N,)    one after the other
    positions  [0, 1, 2, 0, 1]        (N,)    restart at 0 in each sequence: rotary embeddings see what they would alone
    cu_seqlens [0, 3, 5]              (B+1,)  where each sequence begins and ends

Everything but attention works token by token and never notices; attention gets `cu_seqlens` and does not look across.
The row is rounded up to a multiple of ROUND_TO tokens with a last sequence that nobody reads, because matrix kernels
are prepared once a shape: on a CPU a new shape costs 26 ms a matrix, ten times the multiplication itself.

The paper's code pads queries on the left to 512 tokens instead (N+ detail 5); with rotary embeddings, where only the
difference of two positions matters, the result is the same, and a third of the work is saved.

With one post's numbers: docs/walk.md, station 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUND_TO = 256


@dataclass(frozen=True)
class Packed:
    """A packed batch. B sequences, N tokens in all, the filling at the end included."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, 0-based inside each sequence
    cu_seqlens: Tensor  # (B+1,) int32, cumulative lengths, starting with 0
    lengths: tuple[int, ...]  # B lengths, on the host, so that nothing has to ask the device for a shape

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def filling(self) -> int:
        """Tokens at the end that belong to no sequence."""
        return self.tokens.shape[0] - sum(self.lengths)

    def unpack(self, rows: Tensor) -> list[Tensor]:
        """The rows (N, ...) of each sequence: B tensors (T_i, ...)."""
        return list(rows.split([*self.lengths, self.filling])[: len(self.lengths)])

    def last_rows(self) -> Tensor:
        """(B,) int64: the row of each sequence's last token."""
        return self.cu_seqlens[1:].long() - 1

    def response_rows(self, response_length: int) -> Tensor:
        """(B, R) int64: the rows whose hidden state predicts response token t. Sequences end in R response tokens.

        The state *before* token t is the hidden state of the token before it, hence the shift by one (trap T35).
        """
        starts = self.cu_seqlens[1:].long() - response_length - 1  # (B,) the last query token
        return starts[:, None] + torch.arange(response_length, device=starts.device)


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device. On CUDA through pinned memory: an ordinary copy waits for all work given before it."""
    host = host.pin_memory() if torch.device(device).type == "cuda" else host
    return host.to(device, non_blocking=True)


def pack(sequences: list[list[int]], device: torch.device | str = "cpu", round_to: int = ROUND_TO) -> Packed:
    """Pack B token lists into one row. Raises ValueError when there is none, or when one is empty."""
    lengths = tuple(len(sequence) for sequence in sequences)
    if not lengths or min(lengths) == 0:
        raise ValueError(f"sequences: got lengths {lengths[:8]}, expected at least one sequence and none of them empty")
    filling = -sum(lengths) % round_to
    tokens = torch.tensor([token for sequence in sequences for token in sequence] + [0] * filling, dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in (*lengths, filling)])
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    return Packed(*(to_device(x, device) for x in (tokens, positions, cu_seqlens)), lengths)


def split_by_tokens(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, in order, in groups of at most `max_tokens` tokens; a longer sequence is a group alone.

    These groups are the microbatches. Losses are weighted per token over the whole minibatch, so where the cuts fall
    changes neither the loss nor its gradient; it only bounds the memory of one forward and backward pass.
    """
    groups: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if not groups or tokens + length > max_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += length
    return groups


@torch.no_grad()
def in_microbatches(
    forward: Callable[[Packed, list[int]], Sequence[Tensor]],
    sequences: list[list[int]],
    max_tokens: int,
    device: torch.device | str,
) -> tuple[Tensor, ...]:
    """Run `forward(packed, indices)` on all sequences without gradient, at most `max_tokens` tokens at a time.

    -> each of its results, joined along the first dimension in the order of `sequences`
    """
    groups = split_by_tokens([len(sequence) for sequence in sequences], max_tokens)
    results = [forward(pack([sequences[i] for i in group], device), group) for group in groups]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
