"""What a question runs: the values of every arm as `dvc exp run -S` takes them, and the seeds that repeat it.

A question is a file of configs/questions/, or the combinations of `coordexp ab -S key=value,value`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from coordexp.config.loading import read_yaml
from coordexp.config.presets import leaves, overrides, read_preset
from coordexp.config.profile import Profile
from coordexp.config.question import Arm, Question, Trained
from coordexp.config.schema import Params
from coordexp.errors import ConfigError, closest
from coordexp.evaluation.measures import MEASURES
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.registry import metric_specs
from coordexp.experiments.dependencies import ParameterFiles
from coordexp.experiments.readings import READINGS
from coordexp.inputs import PARAMS_FILE, PROFILE_FILE, declarations

AS_COMMITTED = "as in params.yaml"
_BEFORE_STAGE_2 = ("raw", "convert", "norm1000", "pack", "stage1")
_TRAINING = (*_BEFORE_STAGE_2, "rollout", "stage2", "stage1-control")

Settings = Mapping[str, str]  # target of `-S` -> text of the value


@dataclass(frozen=True, slots=True)
class Plan:
    """Arms with their values, and the parameters that tell repetitions of one arm apart."""

    study: Question
    profile: str
    settings: Mapping[str, Settings]  # by arm
    params: Mapping[str, Params]  # by arm: how its answers are read and judged
    profiles: Mapping[str, Profile]  # by arm
    seed_keys: tuple[str, ...]  # of params.yaml; empty where nothing is trained again

    def overrides(self, arm: str, seed: int) -> list[str]:
        """What `dvc exp run -S` is given."""
        return [f"{k}={v}" for k, v in self.settings[arm].items()] + [f"{key}={seed}" for key in self.seed_keys]

    def slug(self, arm: str, seed: int) -> str:
        """A folder and experiment name that no other arm or seed has."""
        words = re.sub(r"[^A-Za-z0-9.]+", "-", arm)[:40].strip("-.")
        return f"{words}-{hashlib.sha256(repr([*self.settings[arm].items()]).encode()).hexdigest()[:6]}-s{seed}"

    def trained(self, checkpoint: Trained) -> tuple[str, ...]:
        """The stages that the arms train for a checkpoint: its own, and stage 1 if a value reaches that."""
        stages = dict.fromkeys((*(("stage1",) if "stage1.seed" in self.seed_keys else ()), checkpoint))
        return tuple(stages) if self.seed_keys else ()


def grid_study(assignments: Sequence[str], title: str) -> Question:
    """All combinations of `key=value,value`, compared with the first; a single one with the parameters as they are.

    Raises:
        ConfigError: an assignment without value, or two arms alike.
    """
    choices = [_choice(assignment) for assignment in assignments]
    keys = [key for key, _ in choices]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"-S {repeated[0]}: given twice; list its values in one, {repeated[0]}=A,B.")
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

    Repetitions vary `stage2.seed`, and `stage1.seed` too if a value of any arm is not the committed one and reaches
    stage 1 or the data: so an experiment on stage 2 takes its stage 1 from the cache, and arms are paired by the same
    seeds.

    Raises:
        ConfigError: an unknown key or preset, a value out of range, or repetitions that would all be alike.
    """
    _check_metrics(study)
    files = ParameterFiles.of(root, study.profile)
    settings = {name: _settings(study.changes, arm, files) for name, arm in study.arms.items()}
    # As the stages will read them, so that a wrong value stops before the first arm trains.
    checked = {name: files.under(values.items(), name) for name, values in settings.items()}
    params = {name: values for name, (values, _) in checked.items()}
    profiles = {name: values for name, (_, values) in checked.items()}
    keys = {key for values in settings.values() for key, text in values.items() if files.differs(key, text)}
    touched = {stage.stage for stage in declarations(root) for key in keys if stage.reads(*_place(key))}
    if not keys and study.budget != "decoding":  # all arms are as committed: it is their training that is repeated
        touched = {arm.checkpoint for arm in study.arms.values()}
    repeated = seed_keys(touched)
    if not repeated and study.seeds > 1:
        raise ConfigError(f"--seeds {study.seeds}: no stage trains again for {', '.join(sorted(keys))}; use --seeds 1.")
    if clash := set(repeated) & {key for values in settings.values() for key in values}:
        raise ConfigError(f"-S {min(clash)}: repetitions set this key themselves; use --seeds.")
    return Plan(study, files.profile_name, settings, params, profiles, repeated)


def _check_metrics(study: Question) -> None:
    """Raise ConfigError if a claim is about a number that nothing reads."""
    known = [*metric_specs(STANDARD), *MEASURES, *READINGS]
    for name, claim in study.claims.items():
        if claim.metric not in known:
            raise ConfigError(
                f"claims.{name}.metric: found {claim.metric!r}, expected a metric of docs/metrics.md, or one of "
                f"{', '.join((*MEASURES, *READINGS))}.{closest(claim.metric, known)}"
            )


def seed_keys(stages: Collection[str]) -> tuple[str, ...]:
    """The parameters that vary when a change that reaches these stages is repeated; none where nothing trains again."""
    if not {*_TRAINING} & {*stages}:
        return ()
    return ("stage1.seed", "stage2.seed") if {*_BEFORE_STAGE_2} & {*stages} else ("stage2.seed",)


def _choice(assignment: str) -> tuple[str, list[str]]:
    key, equals, values = assignment.partition("=")
    listed = [value.strip() for value in values.split(",")]
    if not key.strip() or not equals or not all(listed):
        raise ConfigError(f"-S {assignment}: expected key=value or key=value,value, such as softce_weight=0.1,0.2.")
    if len(set(listed)) < len(listed):
        raise ConfigError(f"-S {assignment}: a value stands there twice; two arms alike have nothing to compare.")
    return key.strip(), listed


def _settings(common: Sequence[str], arm: Arm, files: ParameterFiles) -> Settings:
    """The values of an arm, presets before changes; a later value of a key replaces an earlier one."""
    stated = [change for name in arm.presets for change in overrides(read_preset(name, files.root))[1::2]]
    pairs = [change.partition("=") for change in (*common, *stated, *arm.changes)]
    if wrong := [change for change in (*common, *arm.changes) if not change.partition("=")[2]]:
        raise ConfigError(f"changes: found {wrong[0]!r}, expected KEY=VALUE.")
    chosen = {"profile": files.profile_name} if files.is_other else {}
    return chosen | {_target(key, files): text for key, _, text in pairs}


def _target(key: str, files: ParameterFiles) -> str:
    """What `-S` is told to set: Hydra wants a plus before a key that a profile inherits."""
    target = key.replace("${profile}", files.profile_name)
    file, _, name = target.rpartition(":")
    inherited = file == files.profile_file and name not in dict(leaves(read_yaml(files.root / file)))
    return f"{file}:+{name}" if inherited and not name.startswith("+") else target


def _place(target: str) -> tuple[str, str]:
    """The file, as stages name it, and the key of what `-S` sets."""
    file, colon, key = target.rpartition(":")
    return (PROFILE_FILE if colon and file != PARAMS_FILE else PARAMS_FILE), key.lstrip("+")
