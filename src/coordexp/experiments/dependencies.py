"""What an experiment depends on: one of an older commit still answers for this commit if nothing of that changed.

The `dvc.lock` of an experiment says what every stage ran with, its files under `inputs/` with which values and which
code. Both are compared with what the working tree would run now, for the stages that lead to the files that are read.
Given data are compared by git, because `dvc.lock` of the working tree may be older than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.config.loading import parse_profile, parse_value, profile_tree, read_yaml
from coordexp.config.paths import ProfilePaths
from coordexp.config.presets import changed_tree, with_changes
from coordexp.config.profile import Profile
from coordexp.config.schema import Params
from coordexp.errors import ConfigError
from coordexp.inputs import CODE, PARAMS_FILE, PROFILE_FILE, Inputs, StageTable, first_difference

Lock = Mapping[str, Mapping[str, Any]]  # the `stages` of a dvc.lock
GitIds = Mapping[str, str]  # path -> what git calls its content, for paths that git holds


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of dvc.yaml for one profile."""

    cmd: Any
    deps: frozenset[str]
    outs: frozenset[str]

    def makes(self, path: str) -> bool:
        """Whether a path is an output of the stage, lies in one, or holds one."""
        return any(_overlap(path, out) for out in self.outs)


@dataclass(frozen=True, slots=True)
class Past:
    """A finished experiment."""

    lock: Lock
    ids: GitIds
    inputs: Mapping[str, Inputs]  # by stage


@dataclass(frozen=True, slots=True)
class ParameterFiles:
    """params.yaml and the file of the profile that it names, as they were when read."""

    root: Path
    params: Mapping[str, Any]
    profile: Mapping[str, Any]
    profile_file: str

    @classmethod
    def of(cls, root: Path) -> ParameterFiles:
        """Read both files of a repository; raises ConfigError."""
        params = read_yaml(root / PARAMS_FILE)
        file = PROFILE_FILE.replace("${profile}", str(params.get("profile")))
        return cls(root, params, profile_tree(root / file), file)

    def under(self, settings: Iterable[tuple[str, str]], name: str) -> tuple[Params, Profile]:
        """Parameters and profile as `-S [FILE:]KEY=VALUE`, given as pairs of target and text, would leave them.

        Raises:
            ConfigError: a value is not accepted, naming `name`; the profile, or a file that no stage reads, is set.
        """
        changes: dict[str, dict[str, Any]] = {PARAMS_FILE: {}, self.profile_file: {}}
        for target, text in settings:
            file, colon, key = target.rpartition(":")
            if colon and file not in changes:
                raise ConfigError(
                    f"-S {file}:...: the stages read {PARAMS_FILE} and {self.profile_file}; other files change nothing."
                )
            changes[file if colon else PARAMS_FILE][key] = parse_value(text)
        params = with_changes(self.params, changes[PARAMS_FILE], f"{self.root / PARAMS_FILE} with {name}")
        if params.profile != self.params["profile"]:
            raise ConfigError(
                "-S profile: an A/B test compares within one profile; choose it in params.yaml and commit."
            )
        path = self.root / self.profile_file
        return params, parse_profile(
            path, changed_tree(self.profile, changes[self.profile_file], f"{path} with {name}")
        )


@dataclass(frozen=True, slots=True)
class Present:
    """What the working tree would run an experiment with."""

    plans: Mapping[str, StagePlan]  # the stages that lead to what is read, but for the one that writes their inputs
    targets: tuple[str, ...]  # those of them that make it
    given: tuple[str, ...]  # their dependencies that no stage makes
    ids: GitIds
    lock: Lock
    table: StageTable
    files: ParameterFiles

    @classmethod
    def of(cls, root: Path, profile: str, read: Sequence[str], ids_of: Callable[[Sequence[str]], GitIds]) -> Present:
        """Read the working tree at `root`; `read` are the outputs that the comparison needs.

        Raises:
            ConfigError: no stage makes one of them.
        """
        all_plans = {name: _plan(stage, profile) for name, stage in read_yaml(root / "dvc.yaml")["stages"].items()}
        leading = _leading_to(all_plans, read)
        told = ProfilePaths(profile).inputs.as_posix()
        plans = {name: plan for name, plan in leading.items() if told not in plan.outs}
        outs = {out for plan in leading.values() for out in plan.outs}
        deps = {dep for plan in plans.values() for dep in plan.deps}
        given = tuple(sorted(dep for dep in deps if not any(_overlap(dep, out) for out in outs)))
        lock = read_yaml(root / "dvc.lock")["stages"] if (root / "dvc.lock").is_file() else {}
        targets = tuple(name for name, plan in plans.items() if any(map(plan.makes, read)))
        return cls(plans, targets, given, ids_of(given), lock, StageTable.of(root), ParameterFiles.of(root))

    def input_files(self) -> dict[str, str]:
        """By stage, the file that says what it is told."""
        return {name: dep for name, plan in self.plans.items() for dep in plan.deps if dep.startswith("inputs/")}

    def change(self, past: Past, overrides: Sequence[str]) -> str:
        """What is not as the experiment had it, were it run now with these overrides; the empty string if nothing."""
        for path in self.given:
            if path in self.ids or path in past.ids:
                if self.ids.get(path) != past.ids.get(path):
                    return path
            elif _hashes(self.lock, path) != _hashes(past.lock, path):  # given by DVC, not by git
                return path
        pairs = [override.partition("=")[::2] for override in overrides]
        told = self.table.inputs(*self.files.under(pairs, " ".join(overrides)))
        for name, plan in self.plans.items():
            if name not in past.lock:
                return f"stage {name}"
            if reason := _stage_change(plan, past.lock[name], past.inputs.get(name, {}), told.get(name, {})):
                return f"{reason} of stage {name}"
        return self._other_result(past)

    def _other_result(self, past: Past) -> str:
        """Where the working tree has another result of a stage with the same inputs, and later stages read it."""
        read = {dep for plan in self.plans.values() for dep in plan.deps}
        for name in self.plans:
            then, now = past.lock[name], self.lock.get(name)
            if now is not None and _inputs(then) == _inputs(now):
                outs = _by_path(now, "outs")
                for path, made in _by_path(then, "outs").items():
                    if outs.get(path) != made and any(_overlap(path, dep) for dep in read):
                        return path
        return ""


def _plan(stage: Mapping[str, Any], profile: str) -> StagePlan:
    def names(section: str) -> list[str]:
        return [next(iter(item)) if isinstance(item, dict) else item for item in stage.get(section, [])]

    def rendered(text: Any) -> Any:
        return text.replace("${profile}", profile) if isinstance(text, str) else text

    outs = [rendered(name) for section in ("outs", "metrics", "plots") for name in names(section)]
    return StagePlan(rendered(stage["cmd"]), frozenset(map(rendered, names("deps"))), frozenset(outs))


def _leading_to(plans: Mapping[str, StagePlan], read: Iterable[str]) -> dict[str, StagePlan]:
    """The stages that make these files, and all before them, in the order of dvc.yaml."""
    for path in read:
        if not any(plan.makes(path) for plan in plans.values()):
            raise ConfigError(f"dvc.yaml: no stage makes {path}, which the comparison reads. Is this the repository?")
    found: set[str] = set()
    waiting = list(read)
    while waiting:
        path = waiting.pop()
        makers = {name for name, plan in plans.items() if plan.makes(path)} - found
        found |= makers
        waiting += [dep for name in makers for dep in plans[name].deps]
    return {name: plan for name, plan in plans.items() if name in found}


def _overlap(one: str, other: str) -> bool:
    """Whether one of two paths is the other or lies in it."""
    a, b = PurePosixPath(one), PurePosixPath(other)
    return a.is_relative_to(b) or b.is_relative_to(a)


def _stage_change(plan: StagePlan, entry: Mapping[str, Any], then: Inputs, now: Inputs) -> str:
    if entry["cmd"] != plan.cmd:
        return "the command"
    if _by_path(entry, "deps").keys() != plan.deps:
        return "the list of dependencies"
    if found := first_difference(then, now):
        return "the code" if found[0] == CODE else found[0]
    return ""


def _by_path(entry: Mapping[str, Any], section: str) -> dict[str, Mapping[str, Any]]:
    return {item["path"]: item for item in entry.get(section, [])}


def _inputs(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["cmd"], _by_path(entry, "deps")


def _hashes(lock: Lock, path: str) -> list[Mapping[str, Any]]:
    """What a dvc.lock says of one dependency, for every stage that has it."""
    return [deps[path] for entry in lock.values() if path in (deps := _by_path(entry, "deps"))]
