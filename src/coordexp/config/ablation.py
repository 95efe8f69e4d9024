"""What the objective's ablation compares: arms, their baselines, and the published claims that they can speak to.

Each arm changes one thing against its baseline. Stage-1 arms start from the initial checkpoint and are compared with
the seed recipe; stage-2 arms and the control start from one stage-1 checkpoint a seed (params.yaml as it stands) and
are compared with the control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coordexp.config.presets import read_preset
from coordexp.errors import ConfigError, closest

SEED_RECIPE, CONTROL, STAGE1_DEFAULT, STAGE2_DEFAULT = "seed_recipe", "control", "stage1_default", "stage2_default"
MAIN_METRIC = "coco.mAP"
DUPLICATES = "set.dup_pairs_90"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One training recipe: changes to params.yaml by dotted key, and the arm that it is compared with.

    `coord_init` makes stage 1 start from coordinate rows of that kind instead of the profile's.
    """

    name: str
    stage: Literal["stage1", "stage2", "control"]
    changes: Mapping[str, Any]
    baseline: str
    coord_init: Literal["", "mean", "digits", "ordinal"] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What each arm is given. Stage-2 arms take as many steps as spend the tokens of `stage2_steps` default steps."""

    seeds: tuple[int, ...]
    stage1_steps: int
    stage2_steps: int
    dev_images: int
    val_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What others report of `arm` beside `baseline`: that `metric` is higher, lower, or the same."""

    text: str
    source: str
    arm: str
    baseline: str
    metric: str
    expected: Literal["higher", "lower", "same"]


CLAIMS = (
    Claim(
        text="softCE + W1 + gate without hard cross-entropy loses to pure cross-entropy",
        source="CoordExp notes (val200 AP .2400 against .2712)",
        arm=SEED_RECIPE, baseline="pure_ce", metric=MAIN_METRIC, expected="lower",
    ),
    Claim(
        text="hard cross-entropy + softCE + gate beats pure cross-entropy",
        source="CoordExp notes (AP .4212)",
        arm="mixture", baseline="pure_ce", metric=MAIN_METRIC, expected="higher",
    ),
    Claim(
        text="W1 at weight 0.1 is inert beside softCE",
        source="its gradient is bounded by sd(p) / 999",
        arm="minus_w1", baseline=SEED_RECIPE, metric=MAIN_METRIC, expected="same",
    ),
    Claim(
        text="without the gate, coordinate slots leak to other tokens",
        source="CoordExp notes",
        arm="minus_gate", baseline=SEED_RECIPE, metric=MAIN_METRIC, expected="lower",
    ),
    Claim(
        text="W1 refines and cannot repair: it does not replace softCE",
        source="its gradient vanishes where p is peaked on a wrong bin",
        arm="minus_softce", baseline=SEED_RECIPE, metric=MAIN_METRIC, expected="lower",
    ),
    Claim(
        text="wide targets favour duplicates",
        source="CoordExp notes (coordinate basin)",
        arm="sigma_4", baseline=SEED_RECIPE, metric=DUPLICATES, expected="higher",
    ),
    Claim(
        text="a local two-bin target is better than a broad Gaussian",
        source="GFL, D-FINE",
        arm="two_bin", baseline=SEED_RECIPE, metric=MAIN_METRIC, expected="higher",
    ),
    Claim(
        text="a second soft self-context forward costs accuracy",
        source="CoordExp notes (AP .4533 to .4016)",
        arm="a_only_n2", baseline="a_only_n1", metric=MAIN_METRIC, expected="lower",
    ),
    Claim(
        text="unrolled gradients are as good as detached ones",
        source="the stage-2 decision note keeps unroll without a comparison",
        arm="a_only_n2", baseline="a_only_n2_detach", metric=MAIN_METRIC, expected="same",
    ),
    Claim(
        text="stage 2 is better than stage 1 continued for the same tokens",
        source="what stage 2 is for",
        arm=STAGE2_DEFAULT, baseline=CONTROL, metric=MAIN_METRIC, expected="higher",
    ),
)  # fmt: skip


def all_arms(root: Path) -> list[Arm]:
    """Every arm; presets are read under `root`."""
    recipe = read_preset("seed", root)

    def stage1(name: str, changes: dict[str, Any]) -> Arm:
        return Arm(name=name, stage="stage1", changes=recipe | changes, baseline=SEED_RECIPE)

    def stage2(name: str, changes: Mapping[str, Any]) -> Arm:
        return Arm(name=name, stage="stage2", changes={f"stage2.{k}": v for k, v in changes.items()}, baseline=CONTROL)

    return [
        stage1(SEED_RECIPE, {}),
        stage1("pure_ce", read_preset("pure_ce", root)),
        stage1("mixture", read_preset("mixture", root)),
        stage1("minus_w1", {"stage1.w1_weight": 0.0}),
        stage1("minus_gate", {"stage1.gate_weight": 0.0}),
        stage1("minus_softce", {"stage1.softce_weight": 0.0}),
        stage1("sigma_1", {"sigma": 1.0}),
        stage1("sigma_4", {"sigma": 4.0, "truncate": 16}),
        stage1("two_bin", {"target": "two_bin"}),
        stage1("w1_weight_5", {"stage1.w1_weight": 5.0}),
        Arm(name="init_mean", stage="stage1", changes=recipe, baseline=SEED_RECIPE, coord_init="mean"),
        Arm(name="init_digits", stage="stage1", changes=recipe, baseline=SEED_RECIPE, coord_init="digits"),
        Arm(name=STAGE1_DEFAULT, stage="stage1", changes={}, baseline=SEED_RECIPE),
        Arm(name=CONTROL, stage="control", changes={}, baseline=STAGE1_DEFAULT),
        stage2(STAGE2_DEFAULT, {}),
        stage2("a_only_n1", {"b_ratio": 0.0, "n_softctx_iter": 1}),
        stage2("a_only_n2", {"b_ratio": 0.0, "n_softctx_iter": 2, "softctx_grad_mode": "unroll"}),
        stage2("a_only_n2_detach", {"b_ratio": 0.0, "n_softctx_iter": 2, "softctx_grad_mode": "em_detach"}),
        stage2("b_two_pass", {"b_ratio": 1.0, "passes": "two"}),
        stage2("b_one_pass", {"b_ratio": 1.0, "passes": "one"}),
    ]


def choose_arms(arms: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    """The named arms (all without names) and the baselines that they are compared with, in the order of `arms`.

    Raises:
        ConfigError: an unknown name.
    """
    by_name = {arm.name: arm for arm in arms}
    if unknown := [name for name in names if name not in by_name]:
        raise ConfigError(f"arm {unknown[0]!r}: unknown.{closest(unknown[0], by_name)} Arms: {', '.join(by_name)}.")
    wanted = set(names or by_name)
    while missing := {by_name[name].baseline for name in wanted} - wanted:
        wanted |= missing
    return [arm for arm in arms if arm.name in wanted]
