"""The dependencies of an experiment: one from an older commit is still valid if none of its dependencies changed.

The `dvc.lock` of an experiment records the commands, dependencies and outputs of every stage; its files under `inputs/`
record parameters and code hashes. Both are compared with what the working tree would run now, for the stages upstream
of the files that the comparison reads. Source data are compared by their git ids, because the `dvc.lock` of the working
tree may be older than the data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.config.loading import parse_profile, parse_value, profile_tree, read_yaml
from coordexp.config.paths import ProfilePaths
from coordexp.config.presets import changed_tree, with_changes
from coordexp.config.profile import Profile
from coordexp.config.schema import Params
from coordexp.errors import ConfigError
from coordexp.inputs import (
    CODE,
    PARAMS_FILE,
    PROFILE_FILE,
    Inputs,
    StagePlan,
    StageTable,
    first_difference,
    overlap,
    stage_plans,
)

Lock = Mapping[str, Mapping[str, Any]]  # the `stages` of a dvc.lock
INPUTS = "inputs"
GitIds = Mapping[str, str]  # path -> git's object id, for paths that git tracks


@dataclass(frozen=True, slots=True)
class Past:
    """A finished experiment, or a commit."""

    lock: Lock
    ids: GitIds
    inputs: Mapping[str, Inputs]  # by the path of the file: dvc.lock may hold stages of several profiles
    inputs_md5: Mapping[str, str]  # by the path of the file

    def made(self, path: str) -> str:
        """DVC's hash of an output; empty if no stage made it."""
        outs = (by_path(entry, "outs") for entry in self.lock.values())
        return next((str(found[path].get("md5")) for found in outs if path in found), "")

    def outs(self, path: str) -> list[Mapping[str, Any]]:
        """The entries in the lock file of outputs that are at a path, above it, or below it."""
        outs = (out for entry in self.lock.values() for out in entry.get("outs", []))
        return [out for out in outs if overlap(out["path"], path)]

    def torn(self, stages: Collection[str]) -> str:
        """A dependency of these stages that changed within the same revision after they ran; empty if there is none."""
        made = {item["path"]: item for entry in self.lock.values() for item in entry.get("outs", [])}
        for name in stages:
            for path, item in by_path(self.lock.get(name, {}), "deps").items():
                now = made.get(path, {}).get("md5") or self.inputs_md5.get(path)
                if now and now != item.get("md5"):
                    return path
        return ""


@dataclass(frozen=True, slots=True)
class Change:
    """A difference between two runs: one parameter, or the code of some stages."""

    key: str
    old: Any
    new: Any
    stages: tuple[str, ...]

    def __str__(self) -> str:
        if self.key == CODE:
            return f"code of {', '.join(self.stages)}"
        return f"{self.key} {self.old} -> {self.new}"


def changes(old: Past, new: Past) -> list[Change]:
    """The differences between two runs, parameters first: each key once, with the stages that read it."""
    found: dict[str, Change] = {}
    for path in sorted(old.inputs.keys() & new.inputs.keys()):
        stage, then, now = PurePosixPath(path).stem, old.inputs[path], new.inputs[path]
        for key in then | now:
            if then.get(key) != now.get(key):
                stages = (*found[key].stages, stage) if key in found else (stage,)
                found[key] = Change(key, then.get(key), now.get(key), stages)
    return sorted(found.values(), key=lambda change: change.key == CODE)


@dataclass(frozen=True, slots=True)
class Step:
    """A stage that an experiment would run, and why; with `upstream`, only if the output of that stage changes."""

    stage: str
    reason: str
    upstream: str = ""


@dataclass(frozen=True, slots=True)
class ParameterFiles:
    """The contents of params.yaml and of the file of its profile."""

    root: Path
    params: Mapping[str, Any]
    profile: Mapping[str, Any]
    profile_file: str
    is_other: bool = False  # whether the profile is not the one in params.yaml

    @classmethod
    def of(cls, root: Path, profile: str = "") -> ParameterFiles:
        """Read both files, for the given profile or for the one in params.yaml; raises ConfigError."""
        params = read_yaml(root / PARAMS_FILE)
        committed = str(params.get("profile"))
        chosen = profile or committed
        file = PROFILE_FILE.replace("${profile}", chosen)
        return cls(root, params | {"profile": chosen}, profile_tree(root / file), file, chosen != committed)

    @property
    def profile_name(self) -> str:
        """The profile of the experiments."""
        return str(self.params["profile"])

    def differs(self, target: str, text: str) -> bool:
        """Whether `-S [FILE:]KEY=VALUE` changes the value in the files."""
        file, _, key = target.rpartition(":")
        node: Any = self.profile if file == self.profile_file else self.params
        for part in key.lstrip("+").split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return bool(node != parse_value(text))

    def under(self, settings: Iterable[tuple[str, str]], name: str) -> tuple[Params, Profile]:
        """Parameters and profile after applying `-S [FILE:]KEY=VALUE`, given as pairs of target and text.

        Raises:
            ConfigError: a value is invalid (the message contains `name`), or it sets the profile or another file.
        """
        changes: dict[str, dict[str, Any]] = {PARAMS_FILE: {}, self.profile_file: {}}
        for target, text in settings:
            file, colon, key = target.rpartition(":")
            if colon and file not in changes:
                raise ConfigError(
                    f"-S {file}:...: the stages read only {PARAMS_FILE} and {self.profile_file}. Set a key of these."
                )
            changes[file if colon else PARAMS_FILE][key.lstrip("+")] = parse_value(text)  # Hydra writes `+key`
        params = with_changes(self.params, changes[PARAMS_FILE], f"{self.root / PARAMS_FILE} with {name}")
        if params.profile != self.params["profile"]:
            raise ConfigError(
                "-S profile: experiments are compared within one profile; set it in params.yaml and commit."
            )
        path = self.root / self.profile_file
        return params, parse_profile(
            path, changed_tree(self.profile, changes[self.profile_file], f"{path} with {name}")
        )


@dataclass(frozen=True, slots=True)
class Present:
    """The stages, source data and parameters with which the working tree would run an experiment."""

    graph: Mapping[str, StagePlan]  # all stages except the one that writes their inputs
    plans: Mapping[str, StagePlan]  # those upstream of the files in `read`
    read: tuple[str, ...]
    given: tuple[str, ...]  # source data: dependencies of the plans that no stage makes
    ids: GitIds
    lock: Lock
    table: StageTable
    files: ParameterFiles
    _told: dict[tuple[str, ...], Mapping[str, Inputs]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, root: Path, profile: str, read: Sequence[str], ids_of: Callable[[Sequence[str]], GitIds]) -> Present:
        """Read the working tree at `root`; `read` lists the outputs that the comparison needs.

        Raises:
            ConfigError: no stage makes one of these outputs.
        """
        every = stage_plans(root, profile)
        leading = _leading_to(every, read)
        told = ProfilePaths(profile).inputs.as_posix()
        graph = {name: plan for name, plan in every.items() if told not in plan.outs}
        plans = {name: plan for name, plan in graph.items() if name in leading}
        outs = {out for plan in every.values() for out in plan.outs}
        deps = {dep for plan in plans.values() for dep in plan.deps}
        given = tuple(sorted(dep for dep in deps if not any(overlap(dep, out) for out in outs)))
        lock = read_yaml(root / "dvc.lock")["stages"] if (root / "dvc.lock").is_file() else {}
        table, files = StageTable.of(root), ParameterFiles.of(root, profile)
        return cls(graph, plans, tuple(read), given, ids_of(given), lock, table, files)

    @property
    def targets(self) -> tuple[str, ...]:
        """The stages that make the files in `read`."""
        return tuple(name for name, plan in self.plans.items() if any(map(plan.makes, self.read)))

    def told(self, overrides: Sequence[str]) -> Mapping[str, Inputs]:
        """The inputs of the stages, by the stem of their file; raises ConfigError as `ParameterFiles.under`."""
        if (key := tuple(overrides)) not in self._told:
            pairs = [override.partition("=")[::2] for override in overrides]
            self._told[key] = self.table.inputs(*self.files.under(pairs, " ".join(overrides)))
        return self._told[key]

    def told_stage(self, stage: str, overrides: Sequence[str]) -> Inputs:
        """The inputs of one stage."""
        file = self.graph[stage].inputs
        return self.told(overrides).get(file.stem, {}) if file else {}

    def lineage(self, stage: str, overrides: Sequence[str]) -> str:
        """The inputs of a stage and of all stages upstream: if these are equal, the outputs are equal."""
        leading = _leading_to(self.graph, self.graph[stage].outs)
        return repr([(name, self.told_stage(name, overrides)) for name in leading])

    def change(self, past: Past, overrides: Sequence[str]) -> str:
        """The first difference between an experiment and a run with these overrides now; empty if there is none."""
        for path in self.given:
            if path in self.ids or path in past.ids:
                if self.ids.get(path) != past.ids.get(path):
                    return path
            elif _hashes(self.lock, path) != _hashes(past.lock, path):  # tracked by DVC instead of git
                return path
        for name, plan in self.plans.items():
            if reason := _stage_change(name, plan, past, self.told_stage(name, overrides)):
                return reason
        return past.torn(self.plans) or self._other_result(past)

    def steps(self, past: Past | None, overrides: Sequence[str]) -> list[Step]:
        """The stages that an experiment would run after `past` (default: after a run of the committed values)."""
        found: dict[str, Step] = {}
        for name, plan in self.graph.items():
            told = self.told_stage(name, overrides)
            if past is None:
                reason = (first_difference(self.told_stage(name, []), told) or ("",))[0]
            else:
                reason = _stage_change(name, plan, past, told) or past.torn([name])
            if reason:
                found[name] = Step(name, reason.removesuffix(f" of stage {name}"))
        while below := {
            name: Step(name, "", upstream)
            for name, plan in self.graph.items()
            if name not in found and (upstream := next((up for up in found if self._reads(plan, up)), ""))
        }:
            found |= below
        return [found[name] for name in self.graph if name in found]

    def _reads(self, plan: StagePlan, upstream: str) -> bool:
        return any(self.graph[upstream].makes(dep) for dep in plan.deps)

    def _other_result(self, past: Past) -> str:
        """An output that later stages read and that differs in the working tree although its stage has equal inputs."""
        read = {dep for plan in self.plans.values() for dep in plan.deps}
        for name in self.plans:
            then, now = past.lock[name], self.lock.get(name)
            if now is not None and _inputs(then) == _inputs(now):
                outs = by_path(now, "outs")
                for path, made in by_path(then, "outs").items():
                    if outs.get(path) != made and any(overlap(path, dep) for dep in read):
                        return path
        return ""


def _leading_to(plans: Mapping[str, StagePlan], read: Iterable[str]) -> dict[str, StagePlan]:
    """The stages that make these files, and all stages upstream, in the order of dvc.yaml."""
    for path in read:
        if not any(plan.makes(path) for plan in plans.values()):
            raise ConfigError(
                f"dvc.yaml: no stage makes {path}, which the comparison needs. Run this in the coordexp repository."
            )
    found: set[str] = set()
    waiting = list(read)
    while waiting:
        path = waiting.pop()
        makers = {name for name, plan in plans.items() if plan.makes(path)} - found
        found |= makers
        waiting += [dep for name in makers for dep in plans[name].deps]
    return {name: plan for name, plan in plans.items() if name in found}


def _stage_change(name: str, plan: StagePlan, past: Past, told: Inputs) -> str:
    """Why a stage would run again regardless of the stages upstream; empty if it would not."""
    if (entry := past.lock.get(name)) is None:
        return f"stage {name}"
    if entry["cmd"] != plan.cmd:
        return f"the command of stage {name}"
    if by_path(entry, "deps").keys() != plan.deps:
        return f"the list of dependencies of stage {name}"
    if found := first_difference(past.inputs.get(str(plan.inputs), {}), told):
        return f"{'the code' if found[0] == CODE else found[0]} of stage {name}"
    return ""


def by_path(entry: Mapping[str, Any], section: str) -> dict[str, Mapping[str, Any]]:
    """The items of one section (deps, outs) of a stage in dvc.lock."""
    return {item["path"]: item for item in entry.get(section, [])}


def _inputs(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["cmd"], by_path(entry, "deps")


def _hashes(lock: Lock, path: str) -> list[Mapping[str, Any]]:
    """The entries in a dvc.lock for one dependency, from every stage that has it."""
    return [deps[path] for entry in lock.values() if path in (deps := by_path(entry, "deps"))]
