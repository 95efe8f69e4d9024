"""The arms of an A/B test: every combination of the values asked for, each repeated with other training seeds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from coordexp.errors import ConfigError
from coordexp.experiments.dependencies import ParameterFiles
from coordexp.inputs import PARAMS_FILE, PROFILE_FILE, declarations

BASELINE = "as in params.yaml"
_BEFORE_STAGE_2 = ("raw", "convert", "norm1000", "pack", "stage1")
_TRAINING = (*_BEFORE_STAGE_2, "rollout", "stage2", "stage1-control")


@dataclass(frozen=True, slots=True)
class Arm:
    """One combination of values; without any it is the baseline."""

    settings: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Readable: "softce_weight=0.2"; several joined by a comma."""
        return ", ".join(f"{key}={value}" for key, value in self.settings) or BASELINE

    @property
    def slug(self) -> str:
        """A folder and experiment name that no other arm has."""
        words = re.sub(r"[^A-Za-z0-9.]+", "-", ",".join(f"{key}-{value}" for key, value in self.settings)) or "baseline"
        return f"{words[:40].strip('-.')}-{hashlib.sha256(repr(self.settings).encode()).hexdigest()[:6]}"


@dataclass(frozen=True, slots=True)
class Grid:
    """Arms, the reference first, and the parameters that tell repetitions of one arm apart."""

    arms: tuple[Arm, ...]
    seed_keys: tuple[str, ...]  # of params.yaml; empty where nothing is trained again
    trained: str  # the first stage that a changed value trains again, or "" if none

    @property
    def trained_stages(self) -> tuple[str, ...]:
        """The training stages that a changed value runs again, as far as the judged checkpoint comes from them."""
        return ("stage1", "stage2") if self.trained == "stage1" else ("stage2",) if self.trained else ()

    def overrides(self, arm: Arm, seed: int) -> list[str]:
        """What `dvc exp run -S` is given."""
        return [*(f"{key}={value}" for key, value in arm.settings), *(f"{key}={seed}" for key in self.seed_keys)]


def plan_grid(assignments: Sequence[str], root: Path) -> Grid:
    """All combinations of `key=value,value`; a single one is compared with the parameters as they are.

    Repetitions vary `stage2.seed`, and `stage1.seed` too if a key reaches stage 1 or the data: so an experiment on
    stage 2 takes its stage 1 from the cache.

    Args:
        assignments: as `dvc exp run -S` takes them, `configs/<profile>.yaml:stage2.steps=50,100` included.
        root: the repository, whose parameters the values are checked against.

    Raises:
        ConfigError: an assignment without value, an unknown key, a value out of range, or two arms alike.
    """
    choices = [_choice(assignment) for assignment in assignments]
    keys = [key for key, _ in choices]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"-S {repeated[0]}: given twice; list its values in one, {repeated[0]}=A,B.")
    arms = [Arm(tuple(zip(keys, values, strict=True))) for values in product(*(values for _, values in choices))]
    files = ParameterFiles.of(root)
    for arm in arms:  # as the stages will, so that a wrong value stops before the first arm is trained
        files.under(arm.settings, arm.name)
    if len(arms) == 1:
        arms.insert(0, Arm())
    touched = {stage.stage for stage in declarations(root) for key in keys if stage.reads(*_place(key))}
    trained = [name for name in _TRAINING if name in touched]
    if not trained:
        return Grid(tuple(arms), (), "")
    reaches_stage1 = any(name in _BEFORE_STAGE_2 for name in trained)
    seed_keys = ("stage1.seed", "stage2.seed") if reaches_stage1 else ("stage2.seed",)
    if clash := set(seed_keys) & set(keys):
        raise ConfigError(f"-S {min(clash)}: repetitions set this key themselves; use --seeds.")
    return Grid(tuple(arms), seed_keys, "stage1" if reaches_stage1 else "stage2")


def _choice(assignment: str) -> tuple[str, list[str]]:
    key, equals, values = assignment.partition("=")
    listed = [value.strip() for value in values.split(",")]
    if not key.strip() or not equals or not all(listed):
        raise ConfigError(f"-S {assignment}: expected key=value or key=value,value, such as softce_weight=0.1,0.2.")
    if len(set(listed)) < len(listed):
        raise ConfigError(f"-S {assignment}: a value stands there twice; two arms alike have nothing to compare.")
    return key.strip(), listed


def _place(target: str) -> tuple[str, str]:
    """The file, as stages name it, and the key of what `-S` sets."""
    file, colon, key = target.rpartition(":")
    return (PROFILE_FILE if colon and file != PARAMS_FILE else PARAMS_FILE), key
