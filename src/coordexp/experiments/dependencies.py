"""What an experiment depends on: one of an older commit still answers for this commit if nothing of that changed.

The `dvc.lock` of an experiment says what every stage ran with: command, parameters, hashes of dependencies. It is
compared with what the working tree would run now, for the stages that lead to the files that are read. Sources and
given data are compared by git, because `dvc.lock` of the working tree may be older than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.config.loading import parse_value, read_yaml
from coordexp.config.presets import changed_tree
from coordexp.errors import ConfigError
from coordexp.reporting.reference import PARAMS_FILE

Lock = Mapping[str, Mapping[str, Any]]  # the `stages` of a dvc.lock
GitIds = Mapping[str, str]  # path -> what git calls its content, for paths that git holds


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of dvc.yaml for one profile."""

    cmd: Any
    deps: frozenset[str]
    outs: frozenset[str]
    params: Mapping[str, tuple[str, ...]]  # file -> keys; none are all

    def makes(self, path: str) -> bool:
        """Whether a path is an output of the stage, lies in one, or holds one."""
        return any(_overlap(path, out) for out in self.outs)


@dataclass(frozen=True, slots=True)
class Past:
    """A finished experiment."""

    lock: Lock
    ids: GitIds


@dataclass(frozen=True, slots=True)
class Present:
    """What the working tree would run an experiment with."""

    plans: Mapping[str, StagePlan]  # the stages that lead to what is read
    targets: tuple[str, ...]  # those of them that make it
    given: tuple[str, ...]  # their dependencies that no stage makes
    ids: GitIds
    lock: Lock
    values: Mapping[str, Mapping[str, Any]]  # parameter file -> its tree

    @classmethod
    def of(cls, root: Path, profile: str, read: Sequence[str], ids_of: Callable[[Sequence[str]], GitIds]) -> Present:
        """Read the working tree at `root`; `read` are the outputs that the comparison needs.

        Raises:
            ConfigError: no stage makes one of them.
        """
        all_plans = {name: _plan(stage, profile) for name, stage in read_yaml(root / "dvc.yaml")["stages"].items()}
        plans = _leading_to(all_plans, read)
        outs = {out for plan in plans.values() for out in plan.outs}
        deps = {dep for plan in plans.values() for dep in plan.deps}
        given = tuple(sorted(dep for dep in deps if not any(_overlap(dep, out) for out in outs)))
        files = {file for plan in plans.values() for file in plan.params}
        lock = read_yaml(root / "dvc.lock")["stages"] if (root / "dvc.lock").is_file() else {}
        targets = tuple(name for name, plan in plans.items() if any(map(plan.makes, read)))
        return cls(plans, targets, given, ids_of(given), lock, {file: read_yaml(root / file) for file in files})

    def change(self, past: Past, overrides: Sequence[str]) -> str:
        """What is not as the experiment had it, were it run now with these overrides; the empty string if nothing."""
        for path in self.given:
            if path in self.ids or path in past.ids:
                if self.ids.get(path) != past.ids.get(path):
                    return path
            elif _hashes(self.lock, path) != _hashes(past.lock, path):  # given by DVC, not by git
                return path
        values = _with(self.values, overrides)
        for name, plan in self.plans.items():
            if name not in past.lock:
                return f"stage {name}"
            if reason := _stage_change(plan, past.lock[name], values):
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

    params: dict[str, tuple[str, ...]] = {}
    for item in stage.get("params", []):
        for file, keys in item.items() if isinstance(item, dict) else [(PARAMS_FILE, [item])]:
            params[rendered(file)] = (*params.get(rendered(file), ()), *(keys or ()))
    outs = [rendered(name) for section in ("outs", "metrics", "plots") for name in names(section)]
    return StagePlan(rendered(stage["cmd"]), frozenset(map(rendered, names("deps"))), frozenset(outs), params)


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


def _stage_change(plan: StagePlan, entry: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]]) -> str:
    if entry["cmd"] != plan.cmd:
        return "the command"
    if _by_path(entry, "deps").keys() != plan.deps:
        return "the list of dependencies"
    tracked: Mapping[str, Mapping[str, Any]] = entry.get("params", {})
    if tracked.keys() != plan.params.keys():
        return "the list of parameters"
    for file, keys in plan.params.items():
        wanted = {key: _value(values[file], key) for key in keys or values[file]}
        for key in sorted(wanted.keys() | tracked[file].keys()):
            if not _agree(wanted.get(key), tracked[file].get(key)):
                return key
    return ""


def values_by_file(settings: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """The values of `-S [FILE:]KEY=VALUE`, given as pairs of target and text: file -> dotted key -> value."""
    found: dict[str, dict[str, Any]] = {}
    for target, text in settings:
        file, colon, key = target.rpartition(":")
        found.setdefault(file if colon else PARAMS_FILE, {})[key] = parse_value(text)
    return found


def _with(values: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """The parameters with overrides as `dvc exp run -S` takes them."""
    pairs = (override.partition("=") for override in overrides)
    changes = values_by_file((target, text) for target, _, text in pairs)
    return {
        file: changed_tree(values.get(file, {}), changes.get(file, {}), file)
        for file in dict.fromkeys([*values, *changes])
    }


def _value(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _agree(one: Any, other: Any) -> bool:
    """Equal values; DVC and YAML may read the text of an override as another type."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_agree(one[key], other[key]) for key in one)
    return bool(one == other) or str(one) == str(other)


def _by_path(entry: Mapping[str, Any], section: str) -> dict[str, Mapping[str, Any]]:
    return {item["path"]: item for item in entry.get(section, [])}


def _inputs(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["cmd"], _by_path(entry, "deps"), entry.get("params", {})


def _hashes(lock: Lock, path: str) -> list[Mapping[str, Any]]:
    """What a dvc.lock says of one dependency, for every stage that has it."""
    return [deps[path] for entry in lock.values() if path in (deps := _by_path(entry, "deps"))]
