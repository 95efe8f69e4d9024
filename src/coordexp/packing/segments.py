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

    tokens: (R,) which token stands at each place of the groups; padding repeats a segment's last token. places: (N,)
    where each token stands. shapes: number of segments and padded length of each group; their products add up to R.
    """

    tokens: Tensor
    places: Tensor
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], padded: bool) -> Groups:
        """Group segments of similar length, or of equal length if they may not be padded."""
        sizes_S = np.array(lengths, np.int64)
        starts_S = np.cumsum(sizes_S) - sizes_S
        by_size, n_sizes = np.argsort(sizes_S, kind="stable"), len(set(lengths))
        if padded and n_sizes > MAX_GROUPS:
            groups = np.array_split(by_size, min(MAX_GROUPS, len(by_size)))
        else:
            groups = np.split(by_size, np.flatnonzero(np.diff(sizes_S[by_size])) + 1)
        tokens, places_N = [], np.empty(sizes_S.sum(), np.int64)
        shapes: list[tuple[int, int]] = []
        first = 0  # place of the group
        for group in groups:
            longest = int(sizes_S[group].max())
            columns = np.arange(longest)
            own_size = sizes_S[group, None]
            tokens.append(starts_S[group, None] + np.minimum(columns, own_size - 1))
            places = first + np.arange(tokens[-1].size).reshape(tokens[-1].shape)
            is_token = columns < own_size
            places_N[tokens[-1][is_token]] = places[is_token]
            shapes.append((len(group), longest))
            first += places.size
        tokens_R = np.concatenate([group.ravel() for group in tokens])
        return cls(torch.from_numpy(tokens_R), torch.from_numpy(places_N), tuple(shapes))
