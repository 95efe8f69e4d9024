"""The packing plan: constant-volume packs by first-fit decreasing over a length histogram.

Samples of one length are interchangeable, so the planner packs lengths, not samples: the number of distinct lengths
bounds the work, and 100,000 samples take well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import DataError


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Packs as lists of sample indices, and the volume they were planned for (tokens)."""

    packs: tuple[tuple[int, ...], ...]
    pack_tokens: int
    used_tokens: int

    @property
    def fill(self) -> float:
        """Share of the planned volume that holds tokens."""
        return self.used_tokens / (len(self.packs) * self.pack_tokens) if self.packs else 1.0


def plan_packs(lengths: NDArray[np.integer], pack_tokens: int, seed: int) -> PackPlan:
    """Pack samples into rows of at most `pack_tokens`.

    Which of the samples with equal length goes where, and the order of the packs, is drawn from `seed`.
    Raises DataError naming the first sample that is longer than a pack.
    """
    too_long = np.flatnonzero(lengths > pack_tokens)
    if len(too_long):
        worst = int(too_long[np.argmax(lengths[too_long])])
        raise DataError(
            f"{len(too_long)} of {len(lengths)} samples are longer than packing.pack_tokens = {pack_tokens} (longest: "
            f"sample {worst} with {int(lengths[worst])} tokens). Raise pack_tokens, or lower model.max_pixels."
        )
    rng = np.random.default_rng([seed, 1000])
    available = {int(n): list(rng.permutation(np.flatnonzero(lengths == n))) for n in np.unique(lengths)}
    packs = []
    while available:
        pack: list[int] = []
        room = pack_tokens
        while (length := _longest_that_fits(available, room)) is not None:
            pack.append(int(available[length].pop()))
            room -= length
            if not available[length]:
                del available[length]
        packs.append(tuple(pack))
    order = rng.permutation(len(packs))
    return PackPlan(tuple(packs[i] for i in order), pack_tokens, int(lengths.sum()))


def _longest_that_fits(available: dict[int, list[int]], room: int) -> int | None:
    fitting = [length for length in available if length <= room]
    return max(fitting, default=None)


def pack_rows(lengths: list[int], pack_tokens: int) -> list[list[int]]:
    """First-fit decreasing of a few segments (one training step's pool); indices per row, deterministic.

    A segment longer than `pack_tokens` gets a row of its own: a rollout may outgrow the plan.
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
