"""Where one packed sequence ends and the next begins: what attention needs to keep them apart without a mask.

Shapes: N tokens in one line (rows one after another, or the patches of all pictures), S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

MAX_GROUPS = 4  # of segments of similar length: more waste less padding, but make more and smaller products


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive segments of a line of tokens; all are longer than 0."""

    lengths: tuple[int, ...]
    bounds: Tensor  # (S + 1,) int32: where each begins, and the end

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Segments of these lengths, one after another."""
        return cls(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)

    def to(self, device: torch.device) -> Segments:
        """The same with its bounds on `device`."""
        return Segments(self.lengths, self.bounds.to(device))


@dataclass(frozen=True, slots=True)
class Groups:
    """Segments gathered into groups of one padded length, so that few batched products serve all of them.

    A row is one head of one token, rows of a token one after another. In the groups they stand by segment, head and
    token, each group being (segments, heads, padded length).

    rows: (R,) which row stands at each place of the groups; padding repeats a segment's last token. places:
    (N * heads,) where each row stands. shapes: number of segments and padded length of each group.
    """

    rows: Tensor
    places: Tensor
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], heads: int, padded: bool) -> Groups:
        """Group segments of similar length, or of equal length if they may not be padded."""
        sizes_S = np.array(lengths, np.int64)
        starts_S = np.cumsum(sizes_S) - sizes_S
        by_size, n_sizes = np.argsort(sizes_S, kind="stable"), len(set(lengths))
        if padded and n_sizes > MAX_GROUPS:
            groups = np.array_split(by_size, MAX_GROUPS)
        else:
            groups = np.split(by_size, np.flatnonzero(np.diff(sizes_S[by_size])) + 1)
        rows, places = [], np.empty(sizes_S.sum() * heads, np.int64)
        shapes: list[tuple[int, int]] = []
        first = 0  # place of the group
        for group in groups:
            longest = int(sizes_S[group].max())
            shape = (len(group), heads, longest)
            columns, last = np.arange(longest), sizes_S[group, None, None] - 1
            tokens = starts_S[group, None, None] + np.minimum(columns, last)
            rows.append(tokens * heads + np.arange(heads)[:, None])
            is_token = np.broadcast_to(columns <= last, shape)
            places[rows[-1][is_token]] = (first + np.arange(rows[-1].size).reshape(shape))[is_token]
            shapes.append((len(group), longest))
            first += rows[-1].size
        all_rows = np.concatenate([group.ravel() for group in rows])
        return cls(torch.from_numpy(all_rows), torch.from_numpy(places), tuple(shapes))

    def to(self, device: torch.device) -> Groups:
        """The same with its indices on `device`."""
        return Groups(self.rows.to(device), self.places.to(device), self.shapes)
