"""Schedules: exact channel counts, ends of the learning-rate curves, data order, and the control's budget."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.training.schedule import (
    cosine_schedule,
    epoch_order,
    is_channel_b,
    packs_for_budget,
    step_items,
    trapezoid_schedule,
)

ORDER = "stage1/order"  # of the random streams

# As written in params.yaml, and as exact fractions.
RATIOS = ["0", "0.05", "0.1", "0.125", "0.2", "0.25", "0.29", "0.3", "0.333", "0.4"]
RATIOS += ["0.5", "0.57", "0.58", "0.6", "0.66", "0.7", "0.75", "0.85", "0.99", "1.0"]


@pytest.mark.parametrize("text", RATIOS)
def test_channel_b_is_exact_at_every_step(text):
    """After s steps exactly floor(s b) of them were B: counted in integers, from the decimal digits."""
    numerator, denominator = Decimal(text).as_integer_ratio()
    count = 0
    for step in range(1200):
        count += is_channel_b(step, float(text))
        assert count == (step + 1) * numerator // denominator
    assert Fraction(text) == Fraction(numerator, denominator)


@pytest.mark.parametrize(("b_ratio", "steps", "expected"), [(0.29, 100, 29), (0.58, 100, 58), (0.29, 1000, 290)])
def test_ratios_that_floats_get_wrong(b_ratio, steps, expected):
    assert sum(is_channel_b(s, b_ratio) for s in range(steps)) == expected


@pytest.mark.parametrize(
    ("b_ratio", "pattern"),
    [(0.25, "AAABAAAB"), (0.75, "ABBBABBB"), (0.4, "AABABAABAB"), (0.5, "ABABAB"), (1e-5, "AAAA")],
)
def test_channel_patterns(b_ratio, pattern):
    assert "".join("AB"[is_channel_b(s, b_ratio)] for s in range(len(pattern))) == pattern


def test_cosine_ends():
    factor = cosine_schedule(100, 10)
    assert [factor(s) for s in range(10)] == pytest.approx([0.1 * (s + 1) for s in range(10)])
    assert factor(10) == 1
    assert factor(55) == pytest.approx(0.5)
    assert 0 < factor(99) < 1e-3
    assert factor(100) == pytest.approx(0)
    assert cosine_schedule(100, 0)(0) == 1


def test_trapezoid_ends():
    factor = trapezoid_schedule(100, 10, 0.2)
    assert [factor(0), factor(9), factor(10), factor(80)] == pytest.approx([0.1, 1, 1, 1])
    assert [factor(90), factor(99), factor(100)] == pytest.approx([0.5, 0.05, 0])


@given(st.integers(1, 300), st.data())
def test_schedules_rise_once_and_fall_once(steps, data):
    warmup = data.draw(st.integers(0, steps))
    for schedule in (cosine_schedule(steps, warmup), trapezoid_schedule(steps, warmup, 0.3)):
        values = [schedule(s) for s in range(steps)]
        assert all(0 <= v <= 1 for v in values)
        top = values.index(max(values))
        assert values[: top + 1] == sorted(values[: top + 1])
        assert values[top:] == sorted(values[top:], reverse=True)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 40), st.integers(0, 3))
def test_every_epoch_is_a_permutation(n_items, per_step, steps, seed):
    items = step_items(n_items, per_step, steps, seed, ORDER)
    assert [len(step) for step in items] == [per_step] * steps
    flat = list(chain.from_iterable(items))
    for start in range(0, len(flat) - n_items + 1, n_items):
        assert sorted(flat[start : start + n_items]) == list(range(n_items))


def test_epochs_and_seeds_differ():
    def first_two_epochs(seed: int) -> list[int]:
        order = epoch_order(50, seed, ORDER)
        return [next(order) for _ in range(100)]

    assert first_two_epochs(1) == first_two_epochs(1)
    assert first_two_epochs(1) != first_two_epochs(2)
    assert first_two_epochs(1)[:50] != first_two_epochs(1)[50:]


def test_more_steps_do_not_change_the_first_ones():
    assert step_items(20, 3, 30, 5, ORDER)[:10] == step_items(20, 3, 10, 5, ORDER)


@settings(max_examples=50)
@given(
    st.lists(st.integers(50, 384), min_size=1, max_size=30),
    st.integers(1, 40_000),
    st.integers(1, 20),
    st.integers(0, 3),
)
def test_the_budget_is_spent_evenly(pack_tokens, budget, steps, seed):
    """After step s the tokens seen reach (s + 1) / steps of the budget, by one pack at most too many."""
    plan = packs_for_budget(pack_tokens, budget, steps, seed, ORDER)
    assert len(plan) == steps
    assert all(plan)
    seen = 0
    for step, packs in enumerate(plan):
        for i, pack in enumerate(packs):
            assert i == 0 or seen < budget * (step + 1) / steps  # the pack was still needed
            seen += pack_tokens[pack]
        assert seen >= budget * (step + 1) / steps


def test_a_generous_budget_is_met_within_one_pack():
    plan = packs_for_budget([300, 350, 384, 200], 100_000, 100, 0, ORDER)
    assert 100_000 <= sum([300, 350, 384, 200][i] for step in plan for i in step) < 100_384
