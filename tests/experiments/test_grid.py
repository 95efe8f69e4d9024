"""The arms of an A/B test: combinations, which seeds repeat them, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.errors import ConfigError
from coordexp.experiments.grid import BASELINE, Arm, Grid, plan_grid


@pytest.fixture(scope="module")
def plan(repository: Path):
    def plan(*assignments: str) -> Grid:
        return plan_grid(assignments, repository)

    return plan


def test_all_combinations_in_order(plan) -> None:
    grid = plan("softce_weight=0.1,0.2", "sigma=2.0,3.0")
    assert [arm.name for arm in grid.arms] == [
        "softce_weight=0.1, sigma=2.0",
        "softce_weight=0.1, sigma=3.0",
        "softce_weight=0.2, sigma=2.0",
        "softce_weight=0.2, sigma=3.0",
    ]
    assert len({arm.slug for arm in grid.arms}) == 4


def test_a_single_value_is_compared_with_the_parameters_as_they_are(plan) -> None:
    grid = plan("softce_weight=0.2")
    assert [arm.name for arm in grid.arms] == [BASELINE, "softce_weight=0.2"]
    assert grid.overrides(grid.arms[0], 1) == ["stage2.seed=1"]
    assert grid.overrides(grid.arms[1], 2) == ["softce_weight=0.2", "stage2.seed=2"]


@pytest.mark.parametrize(
    ("key", "seeds", "trained"),
    [
        ("softce_weight=0.1", ("stage2.seed",), "stage2"),
        ("stage2.b_ratio=0.25", ("stage2.seed",), "stage2"),
        ("matching.gate_threshold=0.4", ("stage2.seed",), "stage2"),
        ("decode.temperature=0.5", ("stage2.seed",), "stage2"),  # rollouts are decoded too
        ("sigma=1.5", ("stage1.seed", "stage2.seed"), "stage1"),
        ("stage1.w1_weight=1.0", ("stage1.seed", "stage2.seed"), "stage1"),
        ("text.codec=tags", ("stage1.seed", "stage2.seed"), "stage1"),
        ("configs/tiny.yaml:stage2.steps=50", ("stage2.seed",), "stage2"),
        ("configs/tiny.yaml:stage1.steps=50", ("stage1.seed", "stage2.seed"), "stage1"),
        ("eval.mapping=exact", (), ""),
    ],
)
def test_repetitions_vary_what_the_key_reaches(plan, key: str, seeds: tuple[str, ...], trained: str) -> None:
    grid = plan(key)
    assert (grid.seed_keys, grid.trained) == (seeds, trained)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["softce_weight"], "expected key=value"),
        (["softce_weight=0.1,"], "expected key=value"),
        (["softce_weight=0.1,0.1"], "stands there twice"),
        (["softce_weight=0.1", "softce_weight=0.2"], "given twice"),
        (["softce_wt=0.1"], "softce_weight"),
        (["softce_weight=high"], "softce_weight: found 'high'"),
        (["softce_weight=-1"], "softce_weight"),
        (["softce_weight.x=1"], "is no block"),
        (["stage2.seed=1,2"], "use --seeds"),
        (["configs/tiny.yaml:stage2.steps=many"], "stage2.steps: found 'many'"),
        (["configs/tiny.yaml:stage2.step=5"], "stage2.step: unknown key"),
        (["configs/smoke.yaml:stage2.steps=5"], "other files change nothing"),
        (["profile=smoke"], "within one profile"),
        (["sigma=[1"], "not YAML"),
    ],
)
def test_wrong_assignments_are_refused(plan, assignments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(*assignments)


def test_slugs_are_safe_names() -> None:
    slug = Arm((("configs/tiny.yaml:stage2.steps", "50"), ("sigma", "1.5"))).slug
    assert all(c.isalnum() or c in ".-" for c in slug)
    assert len(slug) <= 47
