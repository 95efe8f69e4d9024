"""The inputs of each stage of the graph: `inputs/<profile>/<stage>.json`, committed to git.

It is the only dependency of a stage in dvc.yaml that is not data. `pipelines/inputs.yaml` declares which keys of
`params.yaml` and of the profile a stage reads. The stage `check` validates both files completely. It then writes for
every stage the values of its keys (the profile includes the pins of the pretrained model) and a hash of the code that
the stage runs. A file whose content would not change is not touched: DVC runs a stage again when its file changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.config.loading import read_yaml
from coordexp.config.presets import leaves
from coordexp.config.profile import Profile
from coordexp.config.run import RunConfig
from coordexp.config.schema import Params
from coordexp.errors import ConfigError, closest
from coordexp.infra.code_hash import Modules
from coordexp.infra.files import write_text
from coordexp.infra.foreign import Gate

INPUTS = Gate("what the stage `check` writes", ConfigError, "Run it again: dvc repro --single-item check.")
TABLE = Path("pipelines/inputs.yaml")
PARAMS_FILE = "params.yaml"
PROFILE_FILE = "configs/${profile}.yaml"  # in the syntax of dvc.yaml
CODE = "code"
# Their whole effect on a stage is in the recorded values, or in the name of a cache.
_LEFT_OUT = ("coordexp.config.loading", "coordexp.config.removed", "coordexp.infra.code_hash", "coordexp.inputs")

Inputs = dict[str, Any]  # the JSON of one stage: values by the keys that `-S` accepts, and last the hash under CODE


@dataclass(frozen=True, slots=True)
class Declaration:
    """The parameters that a stage reads: dotted keys or blocks; `*` matches any letters within one part."""

    stage: str
    params: tuple[str, ...]
    profile: tuple[str, ...]

    @property
    def entry(self) -> str:
        """The entry module of the stage."""
        return f"pipelines.{self.stage.replace('-', '_')}"

    def keys(self, file: str) -> tuple[str, ...]:
        """Keys and blocks of PARAMS_FILE or PROFILE_FILE."""
        return self.params if file == PARAMS_FILE else self.profile

    def reads(self, file: str, key: str) -> bool:
        """Whether the stage reads a key, declared by itself or through its block."""
        return _within(key, self.keys(file))


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of dvc.yaml for one profile."""

    cmd: Any
    deps: frozenset[str]
    outs: frozenset[str]

    def makes(self, path: str) -> bool:
        """Whether a path is an output of the stage, is inside one, or contains one."""
        return any(overlap(path, out) for out in self.outs)

    @property
    def inputs(self) -> PurePosixPath | None:
        """The inputs file of the stage; None for the stage that writes these files."""
        return next((path for dep in self.deps if (path := PurePosixPath(dep)).parts[0] == "inputs"), None)


@cache
def overlap(one: str, other: str) -> bool:
    """Whether the paths are equal, or one is inside the other."""
    a, b = PurePosixPath(one), PurePosixPath(other)
    return a.is_relative_to(b) or b.is_relative_to(a)


def stage_plans(root: Path, profile: str) -> dict[str, StagePlan]:
    """The stages of dvc.yaml in file order, by DVC's names: `decode@base` for an item of a `foreach`."""
    plans = {}
    for name, stage in read_yaml(root / "dvc.yaml")["stages"].items():
        if "foreach" not in stage:
            plans[name] = _plan(stage, profile, {})
            continue
        items = stage["foreach"]
        for key, item in items.items() if isinstance(items, Mapping) else [(item, item) for item in items]:
            fields = {f"item.{field}": value for field, value in item.items()} if isinstance(item, Mapping) else {}
            plans[f"{name}@{key}"] = _plan(stage["do"], profile, {"key": key, "item": item} | fields)
    return plans


def _plan(stage: Mapping[str, Any], profile: str, values: Mapping[str, Any]) -> StagePlan:
    def rendered(text: Any) -> Any:
        for name, value in (*values.items(), ("profile", profile)):  # last, because the values contain it, too
            text = text.replace(f"${{{name}}}", str(value)) if isinstance(text, str) else text
        return text

    def names(*sections: str) -> frozenset[str]:
        listed = (item for section in sections for item in stage.get(section, []))
        return frozenset(rendered(next(iter(item)) if isinstance(item, Mapping) else item) for item in listed)

    return StagePlan(rendered(stage["cmd"]), names("deps"), names("outs", "metrics", "plots"))


def declared_as(stage: str) -> str:
    """The name of a DVC stage in the table: all items of a `foreach` share their inputs."""
    return stage.partition("@")[0]


def following(plans: Mapping[str, StagePlan], stages: Sequence[str]) -> list[str]:
    """All stages downstream of these, without these themselves, in the order of the plans."""
    found, waiting = set(stages), list(stages)
    while waiting:
        made = plans[waiting.pop()]
        new = {name for name, plan in plans.items() if any(map(made.makes, plan.deps))} - found
        found |= new
        waiting += new
    return [name for name in plans if name in found - set(stages)]


def declarations(root: Path) -> list[Declaration]:
    """The table of the repository at `root`; raises ConfigError if it does not exist."""
    table = read_yaml(root / TABLE)
    return [Declaration(name, *(tuple(told.get(k, ())) for k in ("params", "profile"))) for name, told in table.items()]


@dataclass(frozen=True, slots=True)
class StageTable:
    """The parameters that the stages of a repository read, and the code hash of each stage."""

    declarations: tuple[Declaration, ...]
    code: Mapping[str, str]

    @classmethod
    def of(cls, root: Path, only: str | None = None) -> StageTable:
        """Read the table and the sources at `root`, for all stages or one; ConfigError if a module does not exist."""
        declared = tuple(d for d in declarations(root) if only in (None, d.stage))
        modules = Modules.below(root / "src", root)
        if lost := [stage for stage in declared if stage.entry not in modules.files]:
            raise ConfigError(f"{TABLE}: {lost[0].stage}: there is no module {lost[0].entry!r}.")
        return cls(declared, {d.stage: modules.code_hash(d.entry, left_out=_LEFT_OUT) for d in declared})

    def inputs(self, params: Params, profile: Profile) -> dict[str, Inputs]:
        """The inputs by stage for these parameters; raises ConfigError for a declared key that does not exist."""
        told: dict[str, Inputs] = {stage.stage: {} for stage in self.declarations}
        for file, block in ((PARAMS_FILE, params), (PROFILE_FILE, profile)):
            name = file.replace("${profile}", params.profile)
            values = dict(leaves(block.model_dump(mode="json")))
            for stage in self.declarations:
                for key in stage.keys(file):
                    if not any(_within(known, (key,)) for known in values):
                        raise ConfigError(f"{TABLE}: {stage.stage}: {name} has no {key!r}.{closest(key, list(values))}")
                prefix = "" if file == PARAMS_FILE else f"{name}:"
                told[stage.stage] |= {prefix + key: values[key] for key in sorted(values) if stage.reads(file, key)}
        return {stage: inputs | {CODE: self.code[stage]} for stage, inputs in told.items()}


def write_inputs(run: RunConfig, root: Path) -> list[str]:
    """Update the inputs files of a profile from the repository at `root`; returns the stages whose file changed."""
    folder = run.paths.inputs
    told = StageTable.of(root).inputs(run.params, run.profile)
    for stale in folder.glob("*.json"):
        if stale.stem not in told:
            stale.unlink()
    changed = []
    for stage, inputs in told.items():
        path, text = folder / f"{stage}.json", json.dumps(inputs, indent=1, ensure_ascii=False) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
            changed.append(stage)
    return changed


def refuse_stale(run: RunConfig, root: Path, stage: str) -> None:
    """Stop a stage of the graph whose inputs file differs from the present parameters and sources.

    Raises:
        ConfigError: it states the first difference.
    """
    path = run.paths.inputs / f"{stage}.json"
    if not path.is_file():  # run by hand, with outputs outside the graph
        return
    told = StageTable.of(root, only=stage).inputs(run.params, run.profile)
    if found := first_difference(INPUTS.read_object(path), told.get(stage, {})):
        key, then, now = found
        raise ConfigError(
            f"{path}: {key} is {then!r} in this file, but now it is {now!r}. The stage `check` writes this file, and "
            "--single-item and --downstream skip it: run `dvc repro --single-item check` first, or plain `dvc repro`."
        )


def first_difference(then: Inputs, now: Inputs) -> tuple[str, Any, Any] | None:
    """The first key whose values differ between two inputs of a stage (CODE comes last), with both values."""
    for key in sorted(then | now, key=lambda key: key == CODE):
        if then.get(key) != now.get(key):
            return key, then.get(key), now.get(key)
    return None


def _within(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of the names, is inside a block of that name, or matches one with a `*`."""
    parts = key.split(".")
    return any(all(map(fnmatchcase, parts, stated)) for name in names if len(stated := name.split(".")) <= len(parts))
