"""Who runs which rows of an optimizer step: over processes, and within one over several forwards.

The rows of a step are dealt out like cards, so a process has at most one row more than another. Every process makes the
same number of forwards, because collective operations wait for everyone: one that has no row left runs an idle row,
whose losses have no slot and whose gradients are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from coordexp.packing.collator import Collator, PackedBatch, Segment


@dataclass(frozen=True, slots=True)
class RankSlice:
    """Process `index` of `count`, and how many rows it runs in one forward (0: all of its own at once)."""

    index: int = 0
    count: int = 1
    rows_per_forward: int = 0

    def chunks(self, n_rows: int) -> list[list[int]]:
        """Row indices of each forward of this process; an empty list is an idle forward."""
        mine = list(range(self.index, n_rows, self.count))
        most = -(-n_rows // self.count)  # of the process with the most rows
        size = self.rows_per_forward or most
        return [mine[first : first + size] for first in range(0, most, size)]


WHOLE = RankSlice()


def rank_batches(
    collator: Collator, segments: Sequence[Segment], rows: Sequence[Sequence[int]], share: RankSlice
) -> Iterator[PackedBatch]:
    """The batches that this process runs, one after another. Over all processes every row is in exactly one batch.

    Args:
        collator: lays out the batches.
        segments: all segments of the step.
        rows: which segments share a row.
        share: what this process takes.
    """
    for chunk in share.chunks(len(rows)):
        chosen = [rows[r] for r in chunk]
        if chosen:
            own = [segments[i] for row in chosen for i in row]
            ends = np.cumsum([0, *(len(row) for row in chosen)]).tolist()
            yield collator.layout(own, [list(range(a, b)) for a, b in pairwise(ends)])
        else:
            yield collator.idle(segments[rows[0][0]])
