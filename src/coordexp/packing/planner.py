"""The packing plan: packs of at most `pack_tokens` tokens, filled longest sample first.

Samples of equal length are interchangeable, so the planner packs a histogram of lengths, not samples (Krell et al.,
arXiv:2107.02027). The number of distinct lengths bounds the work: 100,000 samples take well under a second. Plain
first-fit decreasing leaves a random gap in every pack; here the last two samples of a pack are chosen together to fill
it best.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coordexp.errors import DataError
from coordexp.infra.artefacts import verified
from coordexp.infra.files import replacing
from coordexp.infra.random_streams import generator


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Packs as lists of sample indices, and their planned volume in tokens."""

    packs: tuple[tuple[int, ...], ...]
    pack_tokens: int
    used_tokens: int

    @property
    def fill(self) -> float:
        """Fraction of the planned volume that holds tokens."""
        return self.used_tokens / (len(self.packs) * self.pack_tokens) if self.packs else 1.0


def plan_packs(lengths: NDArray[np.integer], pack_tokens: int, seed: int) -> PackPlan:
    """Pack samples into rows of at most `pack_tokens`.

    `seed` determines the choice among samples of equal length, and the order of the packs.
    Raises DataError if samples are longer than a pack; the message names the longest.
    """
    too_long = np.flatnonzero(lengths > pack_tokens)
    if len(too_long):
        worst = int(too_long[np.argmax(lengths[too_long])])
        raise DataError(
            f"{len(too_long)} of {len(lengths)} samples are longer than packing.pack_tokens = {pack_tokens} (longest: "
            f"sample {worst} with {int(lengths[worst])} tokens). Increase pack_tokens, or reduce model.max_pixels."
        )
    rng = generator(seed, "pack/order")
    left = _Unpacked(lengths, rng)
    packs = []
    while left.lengths:
        packs.append(tuple(left.fill(pack_tokens)))
    order = rng.permutation(len(packs))
    return PackPlan(tuple(packs[i] for i in order), pack_tokens, int(lengths.sum()))


def write_plan(path: Path, plan: PackPlan) -> None:
    """Write the plan as parquet: one row per sample (pack, sample index), pack by pack."""
    packs = np.repeat(np.arange(len(plan.packs)), [len(p) for p in plan.packs])
    samples = np.concatenate([np.asarray(p) for p in plan.packs])
    with replacing(path) as temporary:
        pq.write_table(pa.table({"pack": packs.astype(np.int32), "sample": samples.astype(np.int32)}), temporary)


def read_packs(path: Path) -> list[list[int]]:
    """Sample indices of every pack, in plan order."""
    table = pq.read_table(verified(path))
    packs, samples = table.column("pack").to_numpy(), table.column("sample").to_numpy()
    return [part.tolist() for part in np.split(samples, np.flatnonzero(np.diff(packs)) + 1)]


def plan_stats(plan: PackPlan) -> dict[str, Any]:
    """Fill and sizes of a plan, for the summary."""
    per_pack = [len(p) for p in plan.packs]
    return {
        "pack_tokens": plan.pack_tokens,
        "packs": len(plan.packs),
        "samples": sum(per_pack),
        "tokens": plan.used_tokens,
        "fill": round(plan.fill, 5),
        "samples_per_pack_mean": round(float(np.mean(per_pack)), 3),
        "samples_per_pack_max": max(per_pack),
    }


class _Unpacked:
    """The samples that are not in a pack yet, by length."""

    def __init__(self, lengths: NDArray[np.integer], rng: np.random.Generator) -> None:
        # Shuffle, then sort stably by length: samples of equal length end up in random order, which `pop` consumes.
        order = rng.permutation(len(lengths))
        order = order[np.argsort(lengths[order], kind="stable")]
        values, starts = np.unique(lengths[order], return_index=True)
        self.lengths: list[int] = values.tolist()  # distinct lengths of the remaining samples, ascending
        self._lengths_D = values
        self._samples = dict(zip(self.lengths, [part.tolist() for part in np.split(order, starts[1:])], strict=True))

    def fill(self, room: int) -> list[int]:
        """Take the samples of one pack: longest first, the last two together. Stops when no sample fits."""
        pack: list[int] = []
        while self.lengths and self.lengths[0] <= room:
            longest = self.lengths[bisect_right(self.lengths, room) - 1]
            # While three samples may fit, taking the longest is safe; the exact fit matters only for the last two.
            has_room_for_three = room - longest >= 2 * self.lengths[0]
            for length in (longest,) if has_room_for_three else self._fullest_two(room):
                pack.append(self._take(length))
                room -= length
        return pack

    def _fullest_two(self, room: int) -> list[int]:
        """The one or two lengths that fill the room best; among equally good choices, the one with the longest sample.

        The longest length that fits leaves a rest of random size, but in a large data set some pair almost always fits
        exactly.
        """
        first_D = self._lengths_D[: bisect_right(self.lengths, room)]
        second_D = np.searchsorted(self._lengths_D, room - first_D, side="right") - 1  # -1: no second sample fits
        # A pair of equal lengths needs two samples of that length.
        for twice in np.flatnonzero(second_D == np.arange(len(first_D))):
            if len(self._samples[self.lengths[twice]]) == 1:
                second_D[twice] -= 1
        total_D = first_D + np.where(second_D >= 0, self._lengths_D[second_D], 0)
        best = int(np.flatnonzero(total_D == total_D.max())[-1])
        return [self.lengths[i] for i in (best, int(second_D[best])) if i >= 0]

    def _take(self, length: int) -> int:
        samples = self._samples[length]
        sample = samples.pop()
        if not samples:
            del self.lengths[bisect_left(self.lengths, length)]
            self._lengths_D = np.array(self.lengths)
        return sample


def pack_rows(lengths: list[int], pack_tokens: int) -> list[list[int]]:
    """Pack a few segments (those of one training step) by first-fit decreasing; returns indices per row.

    First-fit decreasing needs at most 11/9 of the optimal number of rows plus a constant (Johnson 1973). A segment
    longer than `pack_tokens` gets a separate row: a rollout may be longer than planned.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = next((r for r, left in enumerate(room) if left >= lengths[index]), None)
        if target is None:
            rows.append([])
            room.append(pack_tokens)
            target = len(rows) - 1
        rows[target].append(index)
        room[target] -= lengths[index]
    return rows
