"""The packing plan: complete, within its volume, full, and deterministic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import DataError
from coordexp.packing.planner import pack_rows, plan_packs, plan_stats, read_packs, write_plan

lengths_up_to_60 = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def realistic_lengths(count: int) -> np.ndarray:
    """Prompt with 36..144 visual tokens plus 10 tokens an object, as the embedded profile has them."""
    rng = np.random.default_rng(0)
    objects = rng.choice(np.arange(1, 13), size=count, p=0.8 ** np.arange(12) / (0.8 ** np.arange(12)).sum())
    return 18 + rng.choice([36, 48, 64, 72, 96, 144], count) + 3 + 10 * objects + rng.integers(0, 6, count)


@given(lengths_up_to_60, st.integers(60, 200), st.integers(0, 5))
def test_every_sample_once_and_no_pack_over_its_volume(lengths, volume, seed):
    plan = plan_packs(np.array(lengths), volume, seed)
    assert sorted(i for pack in plan.packs for i in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= volume for pack in plan.packs)
    assert plan.used_tokens == sum(lengths)
    assert plan.fill == pytest.approx(sum(lengths) / (len(plan.packs) * volume))


@given(lengths_up_to_60)
def test_at_most_one_pack_is_half_empty(lengths):
    sums = sorted(sum(lengths[i] for i in pack) for pack in plan_packs(np.array(lengths), 100, 0).packs)
    assert all(total > 50 for total in sums[1:])


@pytest.mark.parametrize("volume", [384, 2048])
def test_packs_of_realistic_samples_are_full(volume):
    plan = plan_packs(realistic_lengths(2000), volume, 17)
    assert plan.fill >= 0.97


def test_the_seed_decides_the_plan():
    lengths = realistic_lengths(200)
    assert plan_packs(lengths, 512, 1) == plan_packs(lengths, 512, 1)
    first, second = plan_packs(lengths, 512, 1), plan_packs(lengths, 512, 2)
    assert first.packs != second.packs
    assert len(first.packs) == len(second.packs)


def test_the_order_of_packs_is_not_by_size():
    lengths = realistic_lengths(400)
    sizes = [len(pack) for pack in plan_packs(lengths, 512, 1).packs]
    assert sizes != sorted(sizes)
    assert sizes != sorted(sizes, reverse=True)


def test_a_sample_longer_than_a_pack_is_an_error():
    with pytest.raises(DataError, match=r"2 of 4 samples .* = 100 \(longest: sample 2 with 300 tokens\)"):
        plan_packs(np.array([10, 101, 300, 100]), 100, 0)


@given(lengths_up_to_60, st.integers(30, 120))
def test_rows_contain_every_segment_once_and_only_a_long_one_exceeds_a_row(lengths, volume):
    rows = pack_rows(lengths, volume)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[i] for i in row) <= volume or len(row) == 1


def test_rows_by_hand():
    # decreasing: 60 | 50 30 | 50 | then 30 fits the first row with room for it
    assert pack_rows([30, 50, 60, 30, 50], 90) == [[2, 0], [1, 3], [4]]


def test_the_plan_file_round_trips(tmp_path):
    plan = plan_packs(realistic_lengths(100), 512, 3)
    write_plan(tmp_path / "plan.parquet", plan)
    assert read_packs(tmp_path / "plan.parquet") == [list(pack) for pack in plan.packs]


def test_statistics_of_a_plan():
    stats = plan_stats(plan_packs(np.array([50, 50, 30, 30, 30]), 100, 0))
    assert stats == {
        "pack_tokens": 100,
        "packs": 2,
        "samples": 5,
        "tokens": 190,
        "fill": 0.95,
        "samples_per_pack_mean": 2.5,
        "samples_per_pack_max": 3,
    }
