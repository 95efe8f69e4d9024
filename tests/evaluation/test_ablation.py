"""Differences over seeds and images, the rule of the verdict, and which arms a comparison needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordexp.config.ablation import CLAIMS, Arm, Claim, all_arms, choose_arms
from coordexp.config.loading import read_yaml
from coordexp.config.presets import with_changes
from coordexp.errors import ConfigError
from coordexp.evaluation.ablation import (
    METRICS,
    SeedResult,
    ablation_summary,
    arm_effect,
    judged,
)
from coordexp.evaluation.effect import Effect, Verdict
from coordexp.reporting.ablation_tables import ablation_markdown

ROOT = Path(__file__).parents[2]
ARMS = all_arms(ROOT)


def result(value: float, noise_B: np.ndarray, bin_mae: float = 10.0) -> SeedResult:
    return SeedResult(dict.fromkeys(METRICS, value), dict.fromkeys(METRICS, value + noise_B), bin_mae)


@pytest.fixture
def noise_B() -> np.ndarray:
    return 0.01 * np.random.default_rng(0).standard_normal(2000)


def test_every_arm_is_a_valid_set_of_parameters_and_has_its_baseline():
    tree = read_yaml(ROOT / "params.yaml")
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    for arm in ARMS:
        with_changes(tree, arm.changes, arm.name)
        assert arm.baseline in names
    for claim in CLAIMS:
        assert {claim.arm, claim.baseline} <= set(names)
        assert claim.metric in METRICS


def test_arms_of_stage_1_differ_from_the_recipe_in_what_they_are_named_after():
    changes = {arm.name: arm.changes for arm in ARMS}
    recipe = changes["seed_recipe"]
    for name, key in (
        *[("minus_w1", "stage1.w1_weight"), ("minus_gate", "stage1.gate_weight"), ("two_bin", "target")],
        *[("minus_softce", "stage1.softce_weight"), ("sigma_1", "sigma"), ("w1_weight_5", "stage1.w1_weight")],
    ):
        assert {k for k, v in changes[name].items() if recipe[k] != v} == {key}, name
    assert {k for k, v in changes["sigma_4"].items() if recipe[k] != v} == {"sigma", "truncate"}


def test_choosing_arms_brings_their_baselines():
    assert [arm.name for arm in choose_arms(ARMS, ["pure_ce"])] == ["seed_recipe", "pure_ce"]
    chosen = [arm.name for arm in choose_arms(ARMS, ["b_two_pass"])]
    assert chosen == ["seed_recipe", "stage1_default", "control", "b_two_pass"]
    assert choose_arms(ARMS, []) == ARMS
    with pytest.raises(ConfigError, match=r"arm 'pure_c': unknown\. Did you mean 'pure_ce'"):
        choose_arms(ARMS, ["pure_c"])


def test_noise_of_the_images_cancels_in_a_pair(noise_B):
    """Both arms see the same resamples: what is left of the interval is the spread of the seeds."""
    ours, theirs = [[result(v, noise_B) for v in values] for values in ((0.30, 0.32), (0.25, 0.27))]
    found = arm_effect(ours, theirs, "coco.mAP")
    assert found.delta == pytest.approx(0.05)
    assert (found.lo, found.hi) == pytest.approx((0.05, 0.05))


def test_a_difference_that_changes_sign_with_the_seed_is_not_shown(noise_B):
    ours, theirs = [[result(v, noise_B) for v in values] for values in ((0.30, 0.20, 0.27), (0.25, 0.25, 0.25))]
    found = arm_effect(ours, theirs, "coco.mAP")
    assert found.lo < 0 < found.hi
    assert found.verdict == Verdict.NO_DIFFERENCE


def test_seeds_are_paired(noise_B):
    """A seed that lifts both sides by 0.4 widens nothing: the standard error is that of 0.01 and 0.03."""
    ours, theirs = [[result(v, noise_B) for v in values] for values in ((0.11, 0.53), (0.10, 0.50))]
    assert arm_effect(ours, theirs, "coco.mAP").se_seeds == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("expected", "above", "across", "below"),
    [
        ("higher", "agrees", "not shown", "disagrees"),
        ("lower", "disagrees", "not shown", "agrees"),
        ("same", "disagrees", "agrees (no difference shown)", "disagrees"),
    ],
)
def test_claims_are_judged_by_the_same_rule(expected, above, across, below):
    claim = Claim(text="", source="", arm="a", baseline="b", metric="coco.mAP", expected=expected)
    for (lo, hi), judgement in (((0.01, 0.02), above), ((-0.01, 0.02), across), ((-0.02, -0.01), below)):
        assert judged(claim, Effect((lo + hi) / 2, lo, hi, 0.01, 0.005, None)) == judgement


def test_summary_and_page(noise_B):
    arms = choose_arms(ARMS, ["pure_ce", "mixture"])
    on_val = {
        "seed_recipe": [result(0.2, noise_B)],
        "pure_ce": [result(0.3, noise_B)],
        "mixture": [result(0.1, noise_B)],
    }
    on_dev = {name: [result(0.2 + 0.1 * (name == "mixture"), noise_B)] for name in on_val}
    summary = ablation_summary(arms, {"val": on_val, "dev": on_dev})
    assert [(row["name"], row["verdict"]) for row in summary["arms"]] == [
        *[("seed_recipe", "baseline"), ("pure_ce", "better"), ("mixture", "worse")],
    ]
    assert summary["chosen_on_dev"] == {"stage1": "mixture"}  # dev chooses, whatever val says
    assert [claim["judgement"] for claim in summary["claims"]] == ["agrees", "disagrees"]
    budget = {"seeds": [17], "stage1_steps": 2, "stage2_steps": 2, "dev_images": 2, "val_images": 0}
    page = ablation_markdown(summary | {"budget": budget})
    assert "| `pure_ce` | `seed_recipe` | +0.1000 [0.1000, 0.1000] |" in page
    assert "1 seed(s): 17" in page
    assert "stage1: `mixture`." in page


def test_no_arm_of_a_type_is_no_table(noise_B):
    arm = Arm(name="seed_recipe", stage="stage1", changes={}, baseline="seed_recipe")
    only = {"seed_recipe": [result(0.2, noise_B)]}
    summary = ablation_summary([arm], {"val": only, "dev": only})
    budget = {"seeds": [17], "stage1_steps": 2, "stage2_steps": 2, "dev_images": 2, "val_images": 0}
    page = ablation_markdown(summary | {"budget": budget})
    assert "Stage 2" not in page.split("## ", 1)[1]
    assert "Published claims" not in page
