"""The plan of a question: the values of every arm in the form of `dvc exp run -S`, and the seeds of its repetitions.

A question is a file in configs/questions/, or the combinations of `coordexp ab -S key=value,value`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from coordexp.config.loading import read_yaml
from coordexp.config.presets import leaves
from coordexp.config.profile import Profile
from coordexp.config.question import Arm, Question, Trained
from coordexp.config.schema import Params
from coordexp.errors import ConfigError, closest
from coordexp.evaluation.measures import MEASURES, Measure
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.registry import MetricSpec, metric_specs
from coordexp.experiments.dependencies import ParameterFiles
from coordexp.experiments.readings import READINGS, RunReading
from coordexp.inputs import PARAMS_FILE, PROFILE_FILE, declarations

AS_COMMITTED = "as in params.yaml"
_BEFORE_STAGE_2 = ("raw", "convert", "norm1000", "pack", "stage1")
_TRAINING = (*_BEFORE_STAGE_2, "rollout", "stage2", "stage1-control")

Settings = Mapping[str, str]  # target of `-S` -> value as text


@dataclass(frozen=True, slots=True)
class Plan:
    """Arms with their values, and the seed parameters that distinguish the repetitions of an arm."""

    study: Question
    profile: str
    settings: Mapping[str, Settings]  # by arm
    params: Mapping[str, Params]  # by arm, for readout and evaluation
    profiles: Mapping[str, Profile]  # by arm
    seed_keys: tuple[str, ...]  # keys of params.yaml; empty if no arm trains

    def overrides(self, arm: str, seed: int) -> list[str]:
        """The arguments of `dvc exp run -S`."""
        return [f"{k}={v}" for k, v in self.settings[arm].items()] + [f"{key}={seed}" for key in self.seed_keys]

    def slug(self, arm: str, seed: int) -> str:
        """A unique folder and experiment name for an arm and seed."""
        words = re.sub(r"[^A-Za-z0-9.]+", "-", arm)[:40].strip("-.")
        return f"{words}-{hashlib.sha256(repr([*self.settings[arm].items()]).encode()).hexdigest()[:6]}-s{seed}"

    def trained(self, checkpoint: Trained) -> tuple[str, ...]:
        """The stages that train for a checkpoint: its own, and stage 1 if a value affects it."""
        stages = dict.fromkeys((*(("stage1",) if "stage1.seed" in self.seed_keys else ()), checkpoint))
        return tuple(stages) if self.seed_keys else ()

    def compares_control(self, arm: str) -> bool:
        """Whether the control of the arm's own runs, trained with them, is evaluated."""
        return bool(self.seed_keys) and "stage1-control" in self.study.checkpoints(arm)


def grid_study(assignments: Sequence[str], title: str) -> Question:
    """All combinations of `key=value,value`, compared with the first; a single one with the present parameters.

    Raises:
        ConfigError: an assignment without value, or a repeated value.
    """
    choices = [_choice(assignment) for assignment in assignments]
    keys = [key for key, _ in choices]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"-S {repeated[0]}: given twice; list all values in one option, {repeated[0]}=A,B.")
    found = [
        tuple(f"{k}={v}" for k, v in zip(keys, values, strict=True)) for values in product(*(v for _, v in choices))
    ]
    if len(found) == 1:
        found.insert(0, ())
    names = [", ".join(changes) or AS_COMMITTED for changes in found]
    arms = {
        name: Arm(changes=changes, baseline=names[0] if n else "")
        for n, (name, changes) in enumerate(zip(names, found, strict=True))
    }
    return Question(question=title, arms=arms)


def plan_study(study: Question, root: Path) -> Plan:
    """The plan of a question in the repository at `root`.

    Repetitions vary `stage2.seed`, and also `stage1.seed` if a value of any arm differs from the committed one and
    affects stage 1 or the data, unless the question repeats stage 2 alone. An experiment on stage 2 thus takes its
    stage 1 from the cache, and the arms are paired by equal seeds.

    Raises:
        ConfigError: an unknown key or preset, a value out of range, or repetitions that would all be identical.
    """
    _check_metrics(study)
    files = ParameterFiles.of(root, study.profile)
    settings = {name: _settings(study.changes, arm, files) for name, arm in study.arms.items()}
    # Validated as in the stages, so that an invalid value is reported before the first arm trains.
    checked = {name: files.under(values.items(), name) for name, values in settings.items()}
    params = {name: values for name, (values, _) in checked.items()}
    profiles = {name: values for name, (_, values) in checked.items()}
    keys = {key for values in settings.values() for key, text in values.items() if files.differs(key, text)}
    touched = {stage.stage for stage in declarations(root) for key in keys if stage.reads(*_place(key))}
    if not keys and study.budget != "decoding":  # all arms have the committed values: their training is repeated
        touched = {arm.checkpoint for arm in study.arms.values()}
    repeated = seed_keys(touched)
    if study.repeat == "stage2" and repeated:
        repeated = seed_keys({"stage2"})
    if not repeated and study.seeds > 1:
        raise ConfigError(f"--seeds {study.seeds}: {', '.join(sorted(keys))} affects no training; use --seeds 1.")
    if clash := set(repeated) & {key for values in settings.values() for key in values}:
        raise ConfigError(f"-S {min(clash)}: the repetitions set this key; use --seeds.")
    return Plan(study, files.profile_name, settings, params, profiles, repeated)


def claim_metrics() -> dict[str, MetricSpec | Measure | RunReading]:
    """What a claim may compare, by key: metrics, measures and readings."""
    return {**metric_specs(STANDARD, vocabulary=True), **MEASURES, **READINGS}


def _check_metrics(study: Question) -> None:
    """Raise ConfigError if a claim uses an unknown metric."""
    known = [*claim_metrics()]
    for name, claim in study.claims.items():
        if claim.metric not in known:
            raise ConfigError(
                f"claims.{name}.metric: found {claim.metric!r}, expected a metric of docs/metrics.md, or one of "
                f"{', '.join((*MEASURES, *READINGS))}.{closest(claim.metric, known)}"
            )


def seed_keys(stages: Collection[str]) -> tuple[str, ...]:
    """The seed parameters that vary when a change that affects these stages is repeated; none if nothing trains."""
    if not {*_TRAINING} & {*stages}:
        return ()
    return ("stage1.seed", "stage2.seed") if {*_BEFORE_STAGE_2} & {*stages} else ("stage2.seed",)


def _choice(assignment: str) -> tuple[str, list[str]]:
    key, equals, values = assignment.partition("=")
    listed = [value.strip() for value in values.split(",")]
    if not key.strip() or not equals or not all(listed):
        raise ConfigError(f"-S {assignment}: expected key=value or key=value,value, such as softce_weight=0.1,0.2.")
    if len(set(listed)) < len(listed):
        raise ConfigError(f"-S {assignment}: a value occurs twice, expected distinct values.")
    return key.strip(), listed


def _settings(common: Sequence[str], arm: Arm, files: ParameterFiles) -> Settings:
    """The values of an arm: presets, then changes; a later value of a key replaces an earlier one."""
    pairs = [change.partition("=") for change in (*common, *arm.stated(files.root))]
    if wrong := [change for change in (*common, *arm.changes) if not change.partition("=")[2]]:
        raise ConfigError(f"changes: found {wrong[0]!r}, expected KEY=VALUE.")
    chosen = {"profile": files.profile_name} if files.is_other else {}
    return chosen | {_target(key, files): text for key, _, text in pairs}


def _target(key: str, files: ParameterFiles) -> str:
    """The target of `-S`; Hydra requires a plus before a key that the profile inherits and does not contain."""
    target = key.replace("${profile}", files.profile_name)
    file, _, name = target.rpartition(":")
    inherited = file == files.profile_file and name not in dict(leaves(read_yaml(files.root / file)))
    return f"{file}:+{name}" if inherited and not name.startswith("+") else target


def _place(target: str) -> tuple[str, str]:
    """The file, as stages name it, and the key of an `-S` target."""
    file, colon, key = target.rpartition(":")
    return (PROFILE_FILE if colon and file != PARAMS_FILE else PARAMS_FILE), key.lstrip("+")
