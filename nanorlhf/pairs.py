"""The two summaries of a comparison share their query, so the reward model's trunk reads the query once.

    query [5, 6], chosen [7, 8], rejected [9]
    tokens     [5, 6, 7, 8, 9]   (N,)   one after the other: on TL;DR 1.8 times fewer than two sequences
    positions  [0, 1, 2, 3, 2]   (N,)   both summaries continue the query

Everything but attention works token by token, and behind a causal mask a token of the query sees the query only: its
hidden states are the same in both sequences, and once is enough. Attention, 2% of Llama-3.2-1B's work at this length,
must not look from one summary to the other: on a GPU in bf16 it is given the two sequences apart, [5, 6, 7, 8] and
[5, 6, 9], elsewhere a mask (nanorlhf/attention.py). Scores and gradients are those of two sequences.

With one post's numbers: docs/walk.md, station 4.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanorlhf.packing import ROUND_TO, Packed, pack, to_device


@dataclass(frozen=True)
class PackedPairs(Packed):
    """B pairs. `lengths` and `cu_seqlens` are those of query, chosen and rejected together.

    apart: the batch as variable-length attention sees it: B sequences query + chosen, then B query + rejected, of n
    tokens in all.
    """

    apart: Packed
    spread: Tensor  # (n,) int64: the row here of each token apart; a query's rows occur twice
    home: Tensor  # (N - filling,) int64: the first row apart of each token here

    def last_rows(self) -> Tensor:
        """(2B,) int64: the row of the last token of each chosen summary, then of each rejected one."""
        return self.spread[self.apart.last_rows()]


def pack_pairs(
    queries: list[list[int]],
    chosen: list[list[int]],
    rejected: list[list[int]],
    device: torch.device | str = "cpu",
    round_to: int = ROUND_TO,
) -> PackedPairs:
    """Pack B queries with two summaries each. Raises ValueError when there is none, or one of the three is empty."""
    triples = list(zip(queries, chosen, rejected, strict=True))
    if not all(part for triple in triples for part in triple):
        raise ValueError("pairs: got an empty query or summary, expected at least one token in each")
    packed = pack([q + c + r for q, c, r in triples], device, round_to)
    apart = pack([q + c for q, c, _ in triples] + [q + r for q, _, r in triples], device, round_to=1)

    start, with_chosen, with_rejected = 0, [], []
    for q, c, r in triples:
        end_of_query, end_of_chosen = start + len(q), start + len(q) + len(c)
        with_chosen += range(start, end_of_chosen)
        with_rejected += [*range(start, end_of_query), *range(end_of_chosen, end_of_chosen + len(r))]
        start = end_of_chosen + len(r)
    spread = np.array(with_chosen + with_rejected)
    _, home = np.unique(spread, return_index=True)  # of a row that occurs twice: the first
    spread, home = (to_device(torch.from_numpy(rows), device) for rows in (spread, home))

    positions = packed.positions.clone()
    positions[spread] = apart.positions
    return PackedPairs(packed.tokens, positions, packed.cu_seqlens, packed.lengths, apart, spread, home)
