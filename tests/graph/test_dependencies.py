"""DVC does not see what Python imports and reads: compare each entry with what dvc.yaml declares."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from coordexp.config.loading import load_params, load_profile, read_yaml
from coordexp.config.paths import ProfilePaths
from coordexp.config.run import RunConfig
from coordexp.reporting.inputs import TRAINED, ReportInputs
from source_tree import BASE, ROOT, import_closure, imports, layer_of, lazy_names, modules, syntax

STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]
BASE_STAGES = read_yaml(BASE / "dvc.yaml")["stages"]
PROFILE = "${profile}"


def declared(stage: str, section: str) -> list[str]:
    """The names in one section of a stage, options left out."""
    return [next(iter(item)) if isinstance(item, dict) else item for item in STAGES[stage].get(section, [])]


def tracked_keys(stage: str, file: str) -> set[str]:
    """The parameter keys of one file that a stage tracks."""
    keys = {item for item in STAGES[stage]["params"] if isinstance(item, str)} if file == "params.yaml" else set()
    return keys.union(*(item[file] for item in STAGES[stage]["params"] if isinstance(item, dict) and file in item))


def entry(stage: str) -> str:
    return f"pipelines.{stage.replace('-', '_')}"


@pytest.mark.parametrize("stage", STAGES)
def test_source_dependencies_are_the_layers_that_the_entry_imports(stage: str) -> None:
    needed = {_dependency(name) for name in import_closure(entry(stage))} - {""}
    listed = {dep for dep in declared(stage, "deps") if dep.startswith(("src/", "pipelines/"))}
    assert needed, f"{entry(stage)} does not exist"
    assert listed == needed, f"deps of {stage} should be:\n" + "\n".join(f"      - {dep}" for dep in sorted(needed))


@pytest.mark.parametrize("stage", BASE_STAGES)
def test_the_base_model_depends_on_the_layers_that_its_stages_import(stage: str) -> None:
    needed = {_dependency(name) for name in import_closure(f"pipelines.base.{stage}")} - {""}
    relative = {os.path.relpath(ROOT / path, BASE) for path in needed}
    listed = {dep for dep in BASE_STAGES[stage]["deps"] if dep.startswith("../../src/") or dep.endswith(".py")}
    assert listed == relative, f"deps of {stage} should be:\n" + "\n".join(f"      - {p}" for p in sorted(relative))


def _dependency(module: str) -> str:
    """The path that dvc.yaml lists for a module: its layer's folder, or the file outside of any folder."""
    file = modules()[module].relative_to(ROOT)
    if file.parts[:2] == ("src", "toyworld"):
        return "src/toyworld"
    if layer := layer_of(module):
        return f"src/coordexp/{layer}" if file.parts[2:] != (f"{layer}.py",) else file.as_posix()
    return "" if file.name == "__init__.py" else file.as_posix()


@pytest.mark.parametrize("package", ["coordexp", "pipelines"])
def test_the_package_files_that_no_stage_lists_do_nothing_of_their_own(package: str) -> None:
    """They call what they import from a file that stages list, and name what is loaded when a user asks for it."""
    own = syntax(modules()[package]).body
    imported = {alias.name for node in own if isinstance(node, ast.ImportFrom) for alias in node.names}
    for node in own:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING"
        elif isinstance(node, ast.FunctionDef):
            assert node.name == "__getattr__"
        else:
            assert isinstance(node, ast.Expr | ast.Assign | ast.ImportFrom)
            calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
            assert {ast.unparse(call.func) for call in calls} <= imported


def test_no_module_asks_the_package_for_what_it_loads_on_first_use() -> None:
    asked = {f"coordexp.{name.rpartition('.')[2]}" for name in lazy_names()} - modules().keys()
    assert "coordexp.Detector" in asked
    for name in modules().keys() - {"coordexp"}:
        assert not asked & set(imports(modules()[name])), name


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_depends_on_the_whole_source(stage: str) -> None:
    assert not {"src", "src/", "src/coordexp", "src/coordexp/"} & set(declared(stage, "deps"))


def test_the_embedded_world_is_known_to_the_stage_that_composes_it_alone() -> None:
    assert [stage for stage in STAGES if "src/toyworld" in declared(stage, "deps")] == ["raw"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("holder", "file"), [("params", "params.yaml"), ("profile", f"configs/{PROFILE}.yaml")])
def test_parameters_that_the_entry_reads_are_tracked(stage: str, holder: str, file: str) -> None:
    read = {key for key in keys_read(syntax(modules()[entry(stage)]), holder) if key != "profile"}
    if "model_dump" in read:  # all of them
        read = read - {"model_dump"} | {key for key in read_yaml(ROOT / file) if key != "profile"}
    lost = {key for key in read if not any(key == t or key.startswith(f"{t}.") for t in tracked_keys(stage, file))}
    assert lost == set(), f"{stage} reads them, so dvc.yaml must list them under {file}"


def keys_read(tree: ast.AST, holder: str) -> Iterator[str]:
    """Dotted keys of the attribute chains on `<holder>` and `<any>.<holder>`: "text.codec" of `params.text.codec`."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            parts = ast.unparse(node).split(".")
            if holder in parts[:2] and parts[-1] != holder:
                yield ".".join(parts[parts.index(holder) + 1 :])


@pytest.mark.parametrize("stage", STAGES)
def test_folders_that_the_entry_names_are_declared(stage: str) -> None:
    known = [
        PurePosixPath(path) for section in ("deps", "outs", "metrics", "plots") for path in declared(stage, section)
    ]
    for path in paths_named(syntax(modules()[entry(stage)])):
        related = any(path.is_relative_to(other) or other.is_relative_to(path) for other in known)
        assert related, f"{stage} names {path}, which is neither a dependency nor an output"


def test_the_report_declares_what_it_reads_and_nothing_else() -> None:
    """Its folders are named in the library, where the test above does not look.

    The decoding study is made on demand, so the graph cannot ask for it; the report takes it only if it names the very
    weights that are reported (tests/reporting/test_decoding_tables.py), and says so otherwise.
    """
    run = RunConfig(
        params=load_params(ROOT / "params.yaml"),
        profile=load_profile(ROOT / "configs" / "tiny.yaml"),
        paths=ProfilePaths(PROFILE),
    )
    inputs = ReportInputs.of(run)
    named = {value for name in inputs.__slots__ if isinstance(value := getattr(inputs, name), Path)} - {inputs.runs}
    read = named - {inputs.decoding_study} | {inputs.runs / stage for stage in TRAINED}
    deps = [PurePosixPath(dep) for dep in declared("report", "deps") if PROFILE in dep]
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


def test_what_the_readers_see() -> None:
    tree = ast.parse(
        "def run(context):\n"
        "    lr, weights = context.profile.stage1.lr, context.params.stage1\n"
        "    train(params.sigma, out=context.paths.run('stage1') / 'x', init=context.paths.norm1000)\n"
    )
    assert set(keys_read(tree, "params")) == {"stage1", "sigma"}
    assert set(keys_read(tree, "profile")) == {"stage1.lr"}
    assert {path.as_posix() for path in paths_named(tree)} == {f"runs/{PROFILE}/stage1", f"data/{PROFILE}/norm1000"}
