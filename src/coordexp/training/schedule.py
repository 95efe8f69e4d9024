"""Learning-rate schedules, which data a step sees, and which channel a step is: all pure functions of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate

from coordexp.infra.random_streams import generator

Schedule = Callable[[int], float]


def cosine_schedule(steps: int, warmup_steps: int) -> Schedule:
    """Linear warm-up, then a cosine to zero at `steps`; returns the factor of the peak learning rate."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return factor


def trapezoid_schedule(steps: int, warmup_steps: int, decay_fraction: float) -> Schedule:
    """Linear warm-up, constant, then linear to zero over the last `decay_fraction` of the steps."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup_steps), (steps - step) / max(1.0, decay_fraction * steps))

    return factor


def legs_schedule(leg_steps: Sequence[int], warmup_steps: int, decay_fraction: float) -> Schedule:
    """One trapezoid after another: each leg of training warms up and settles on its own."""
    ends = list(accumulate(leg_steps))
    legs = [trapezoid_schedule(steps, warmup_steps, decay_fraction) for steps in leg_steps]

    def factor(step: int) -> float:
        leg = min(bisect_right(ends, step), len(legs) - 1)
        return legs[leg](step - (ends[leg] - leg_steps[leg]))

    return factor


def ramp(start: float, end: float, steps: int) -> Schedule:
    """A value that goes linearly from `start` at step 0 to `end` at `steps` and stays there; 0 steps: `end` at once."""

    def value(step: int) -> float:
        return end if step >= steps else start + (end - start) * step / steps

    return value


def epoch_order(n_items: int, seed: int, stream: str) -> Iterator[int]:
    """Endless item indices, each epoch a fresh permutation drawn from the stream."""
    epoch = 0
    while True:
        yield from generator(seed, stream, epoch).permutation(n_items).tolist()
        epoch += 1


def step_items(n_items: int, items_per_step: int, steps: int, seed: int, stream: str) -> list[list[int]]:
    """Item indices of every step. Data order is thus known before training and a resumed run needs no replay."""
    order = epoch_order(n_items, seed, stream)
    return [[next(order) for _ in range(items_per_step)] for _ in range(steps)]


def is_channel_b(step: int, b_ratio: float) -> bool:
    """True if step s belongs to channel B: floor((s+1) b) > floor(s b), in exact rationals of b's decimal form.

    Floats would lose steps (b = 0.29 gives 28 instead of 29 of the first 100).
    """
    ratio = Fraction(str(b_ratio))
    return math.floor((step + 1) * ratio) > math.floor(step * ratio)


def packs_for_budget(
    pack_tokens: Sequence[int], budget_tokens: int, steps: int, seed: int, stream: str
) -> list[list[int]]:
    """Pack indices of every step, so that the tokens seen after step s are (s + 1) / steps of the budget.

    Each step takes packs while its share of the budget is not reached, and at least one.
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
