"""Learning-rate schedules, data order and channel of each step: all pure functions of the step.

Resuming therefore needs no state for them: the step number is enough.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate

from coordexp.infra.random_streams import generator

Schedule = Callable[[int], float]


def cosine_schedule(steps: int, warmup_steps: int) -> Schedule:
    """Linear warm-up, then a cosine to zero at `steps`; returns the factor on the peak learning rate.

    The cosine is that of SGDR without restarts (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5).
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor


def trapezoid_schedule(steps: int, warmup_steps: int, decay_fraction: float) -> Schedule:
    """Linear warm-up, constant, then linear decay to zero over the last `decay_fraction` of the steps.

    It matches a cosine, and its length can change without changing the steps before the decay (Hagele et al. 2024,
    arXiv:2405.18392, section 3).
    """

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup_steps), (steps - step) / max(1.0, decay_fraction * steps))

    return factor


def segments_schedule(segment_steps: Sequence[int], warmup_steps: int, decay_fraction: float) -> Schedule:
    """One trapezoid after another: each segment of training has its own warm-up and decay."""
    ends = list(accumulate(segment_steps))
    segments = [trapezoid_schedule(steps, warmup_steps, decay_fraction) for steps in segment_steps]

    def factor(step: int) -> float:
        i = min(bisect_right(ends, step), len(segments) - 1)
        return segments[i](step - (ends[i] - segment_steps[i]))

    return factor


def ramp(start: float, end: float, steps: int) -> Schedule:
    """A linear ramp from `start` at step 0 to `end` at `steps`, constant afterwards; with 0 steps, always `end`."""

    def value(step: int) -> float:
        return end if step >= steps else start + (end - start) * step / steps

    return value


def epoch_order(n_items: int, seed: int, stream: str) -> Iterator[int]:
    """An endless sequence of item indices; each epoch is a new permutation from the random stream."""
    epoch = 0
    while True:
        yield from generator(seed, stream, epoch).permutation(n_items).tolist()
        epoch += 1


def step_items(n_items: int, items_per_step: int, steps: int, seed: int, stream: str) -> list[list[int]]:
    """Item indices of every step. The data order is known before training, so a resumed run needs no replay."""
    order = epoch_order(n_items, seed, stream)
    return [[next(order) for _ in range(items_per_step)] for _ in range(steps)]


def is_channel_b(step: int, b_ratio: float) -> bool:
    """Whether step s belongs to channel B: floor((s+1) b) > floor(s b), which spreads the steps of channel B evenly.

    b is an exact rational of its decimal form. Floats would lose steps (b = 0.29 gives 28 instead of 29 of the first
    100).
    """
    ratio = Fraction(str(b_ratio))
    return math.floor((step + 1) * ratio) > math.floor(step * ratio)


def packs_for_budget(
    pack_tokens: Sequence[int], budget_tokens: int, steps: int, seed: int, stream: str
) -> list[list[int]]:
    """Pack indices of every step, such that (s + 1) / steps of the token budget is used after step s.

    Each step takes at least one pack, and further packs until it reaches its part of the budget.
    """
    order = epoch_order(len(pack_tokens), seed, stream)
    plan, seen = [], 0
    for step in range(steps):
        items: list[int] = []
        while not items or seen < budget_tokens * (step + 1) / steps:
            items.append(next(order))
            seen += pack_tokens[items[-1]]
        plan.append(items)
    return plan
