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

from nanorlhf import parallel

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


def deal(lengths: list[int], hands: int, most: list[int] | None = None) -> list[list[int]]:
    """Indices of sequences in `hands` groups of about equally many tokens: the longest first, each to the group that
    has the fewest so far (Graham 1969: at worst 4/3 of the best). most: how many sequences a group may have."""
    groups: list[list[int]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = [hand for hand in range(hands) if most is None or len(groups[hand]) < most[hand]]
        hand = min(free, key=lambda hand: (tokens[hand], hand))
        groups[hand].append(index)
        tokens[hand] += lengths[index]
    return [sorted(group) for group in groups]


def share_out(lengths: list[int], max_tokens: int, processes: int) -> list[list[list[int]]]:
    """Microbatches for each of several processes, [process][turn] -> indices: of at most `max_tokens` tokens, about
    equally many in each, and the same number for all, because the processes meet in every layer of every turn. The
    last of a process may be empty, where there are too few sequences.
    """
    turns = max(1, -(-sum(lengths) // (max_tokens * processes)))
    while True:
        groups = deal(lengths, turns * processes)
        if all(len(group) <= 1 or sum(lengths[i] for i in group) <= max_tokens for group in groups):
            return [sorted(groups[i::processes], key=len, reverse=True) for i in range(processes)]
        turns += 1


def microbatches(lengths: list[int], max_tokens: int) -> list[tuple[list[int], bool]]:
    """The groups of `split_by_tokens`; under torchrun this process's share of them. Each with whether it counts: where
    others have one more, a process goes through a sequence that is not its own, with weight 0."""
    if parallel.size() == 1:
        return [(group, True) for group in split_by_tokens(lengths, max_tokens)]
    shortest = min(range(len(lengths)), key=lambda i: lengths[i])
    mine = share_out(lengths, max_tokens, parallel.size())[parallel.rank()]
    return [(group or [shortest], bool(group)) for group in mine]


def own_rows(lengths: list[int]) -> list[int]:
    """The sequences of a batch that this process continues: always as many, because a decoder is made for a number of
    them, and of about as many tokens as the others'. All, without torchrun."""
    n, processes = len(lengths), parallel.size()
    if processes == 1:
        return list(range(n))
    return deal(lengths, processes, [n // processes + (i < n % processes) for i in range(processes)])[parallel.rank()]


@torch.no_grad()
def in_microbatches(
    forward: Callable[[Packed, list[int]], Sequence[Tensor]],
    sequences: list[list[int]],
    max_tokens: int,
    device: torch.device | str,
    progress: Callable = lambda turns: turns,
) -> tuple[Tensor, ...]:
    """Run `forward(packed, indices)` on all sequences without gradient, at most `max_tokens` tokens at a time.

    -> each of its results, joined along the first dimension in the order of `sequences`. Under torchrun each process
    runs its share, and all get all results.
    """
    turns = microbatches([len(sequence) for sequence in sequences], max_tokens)
    results = [forward(pack([sequences[i] for i in group], device), group) for group, _ in progress(turns)]
    if not parallel.on():
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
    mine = [i for group, counts in turns if counts for i in group]
    parts = (torch.cat(parts)[: len(mine)] for parts in zip(*results, strict=True))  # what does not count comes last
    return parallel.whole(tuple(parts), mine, len(sequences))
