"""DVC does not see what Python imports and reads, so compare each entry with the declarations in dvc.yaml."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from coordexp.config.loading import load_params, load_profile, read_yaml
from coordexp.config.paths import ProfilePaths
from coordexp.config.run import RunConfig
from coordexp.infra.code_hash import Modules
from coordexp.inputs import declarations
from coordexp.reporting.inputs import TRAINED, ReportInputs
from source_tree import BASE, ROOT, imports, layer_of, lazy_names, modules, syntax

STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]
BASE_STAGES = read_yaml(BASE / "dvc.yaml")["stages"]
ENTRIES = {stage.stage: stage.entry for stage in declarations(ROOT)}
PROFILE = "${profile}"


def declared(stage: str, section: str) -> list[str]:
    """The names in one section of a stage, options left out."""
    described = STAGES[stage].get("do", STAGES[stage])  # of a stage that there is for each checkpoint
    return [next(iter(item)) if isinstance(item, dict) else item for item in described.get(section, [])]


def test_check_runs_again_after_any_change_of_its_inputs() -> None:
    closure = Modules.below(ROOT / "src", ROOT).import_closure(*ENTRIES.values(), "pipelines.check")
    files = [modules()[name].relative_to(ROOT) for name in closure - {"pipelines"}]
    files += [Path("pipelines/inputs.yaml"), *(p.relative_to(ROOT) for p in ROOT.glob("configs/*.yaml"))]
    deps = declared("check", "deps")
    assert [file for file in files if not any(file.is_relative_to(dep) for dep in deps)] == []
    assert [dep for dep in deps if not any(file.is_relative_to(dep) for file in files)] == []
    assert STAGES["check"]["params"] == [{"params.yaml": None}]  # all of it


def test_every_other_stage_depends_on_its_file_and_on_no_source_or_parameter() -> None:
    assert STAGES.keys() == {"check", *ENTRIES}
    for stage in ENTRIES:
        deps = declared(stage, "deps")
        assert [dep for dep in deps if dep.startswith("inputs/")] == [f"inputs/{PROFILE}/{stage}.json"]
        assert not [dep for dep in deps if dep.startswith(("src", "pipelines", "configs", "params"))]
        assert "params" not in STAGES[stage]


@pytest.mark.parametrize("stage", BASE_STAGES)
def test_the_base_model_depends_on_the_layers_that_its_stages_import(stage: str) -> None:
    closure = Modules.below(ROOT / "src", ROOT).import_closure(f"pipelines.base.{stage}")
    needed = {_dependency(name) for name in closure} - {""}
    relative = {os.path.relpath(ROOT / path, BASE) for path in needed}
    listed = {dep for dep in BASE_STAGES[stage]["deps"] if dep.startswith("../../src/") or dep.endswith(".py")}
    assert listed == relative, f"deps of {stage} should be:\n" + "\n".join(f"      - {p}" for p in sorted(relative))


def _dependency(module: str) -> str:
    """The path in dvc.yaml for a module: the folder of its layer, or the file if it is in no layer."""
    file = modules()[module].relative_to(ROOT)
    if file.parts[:2] == ("src", "toyworld"):
        return "src/toyworld"
    if layer := layer_of(module):
        return f"src/coordexp/{layer}" if file.parts[2:] != (f"{layer}.py",) else file.as_posix()
    return "" if file.name == "__init__.py" else file.as_posix()


def test_no_module_uses_the_lazy_names_of_the_package() -> None:
    asked = {f"coordexp.{name.rpartition('.')[2]}" for name in lazy_names()} - modules().keys()
    assert "coordexp.Detector" in asked
    for name in modules().keys() - {"coordexp"}:
        assert not asked & set(imports(modules()[name])), name


@pytest.mark.parametrize("stage", ENTRIES)
def test_folders_used_by_an_entry_are_declared(stage: str) -> None:
    known = [
        PurePosixPath(path) for section in ("deps", "outs", "metrics", "plots") for path in declared(stage, section)
    ]
    for path in paths_named(syntax(modules()[ENTRIES[stage]])):
        related = any(path.is_relative_to(other) or other.is_relative_to(path) for other in known)
        assert related, f"{stage} names {path}, which is neither a dependency nor an output"


def test_the_report_declares_what_it_reads_and_nothing_else() -> None:
    """Its folders are named in the library, where the test above does not look."""
    run = RunConfig(
        params=load_params(ROOT / "params.yaml"),
        profile=load_profile(ROOT / "configs" / "tiny.yaml"),
        paths=ProfilePaths(PROFILE),
    )
    inputs = ReportInputs.of(run)
    named = {value for name in inputs.__slots__ if isinstance(value := getattr(inputs, name), Path)} - {inputs.runs}
    read = named | {inputs.runs / stage for stage in TRAINED}
    deps = [
        PurePosixPath(dep) for dep in declared("report", "deps") if PROFILE in dep and not dep.startswith("inputs/")
    ]
    assert [path for path in read if not any(path.is_relative_to(dep) for dep in deps)] == []
    assert [dep for dep in deps if not any(path.is_relative_to(dep) for path in read)] == []


def paths_named(tree: ast.AST) -> Iterator[Path]:
    """The folders reached as `<anything>.paths.<name>` or `paths.<name>("constant")`."""
    paths = ProfilePaths(PROFILE)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "paths":
            value = getattr(paths, node.attr)
            if isinstance(value, Path):
                yield value
            elif (call := called.get(id(node))) and all(isinstance(arg, ast.Constant) for arg in call.args):
                yield value(*(arg.value for arg in call.args if isinstance(arg, ast.Constant)))


def test_the_path_parser_finds_every_notation() -> None:
    tree = ast.parse("def run(c):\n    train(out=c.paths.run('stage1') / 'x', init=c.paths.norm1000)\n")
    assert {path.as_posix() for path in paths_named(tree)} == {f"runs/{PROFILE}/stage1", f"data/{PROFILE}/norm1000"}
