"""The stage graph as DVC reads it, for every profile."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from dvc.stage import PipelineStage

from coordexp.config.loading import load_params, load_profile
from coordexp.config.paths import CHECKPOINTS, ProfilePaths
from coordexp.config.presets import leaves
from coordexp.inputs import PARAMS_FILE, PROFILE_FILE, declarations

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # inside DVC
ROOT = Path(__file__).parents[2]
PROFILES = sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
CHAIN = (
    *("check", "raw", "convert", "norm1000", "pack", "stage1", "rollout", "stage2"),
    *("decode@stage2", "coco-eval", "report"),
)
STAGES = {*CHAIN, "stage1-control", *(f"decode@{name}" for name in CHECKPOINTS)}
TABLE = declarations(ROOT)
READ_BY_NONE = {"profile", "model.path"}  # one is in every command and path, the other is known by the pins


@dataclass(slots=True)
class Node:
    """One stage: the paths it reads and writes, the parameter keys it depends on by file."""

    cmd: str
    deps: list[str] = field(default_factory=list)
    outs: list[str] = field(default_factory=list)
    params: dict[str, list[str]] = field(default_factory=dict)
    uncached: set[str] = field(default_factory=set)
    plots: dict[str, dict[str, Any]] = field(default_factory=dict)


@cache
def graph(profile: str) -> dict[str, Node]:
    """The stages of dvc.yaml rendered for one profile, in the order of the file."""
    with TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "configs", Path(folder, "configs"))
        shutil.copy(ROOT / "dvc.yaml", folder)
        params = (ROOT / "params.yaml").read_text(encoding="utf-8")
        Path(folder, "params.yaml").write_text(re.sub(r"(?m)^profile: \S+", f"profile: {profile}", params))
        with Repo.init(folder, no_scm=True) as repo:
            index = repo.index
            index.check_graph()  # cycles, repeated and overlapping outputs
            return {stage.name: _node(stage) for stage in index.stages if isinstance(stage, PipelineStage)}


def _node(stage: PipelineStage) -> Node:
    node = Node(stage.cmd)
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            node.params[dep.def_path] = list(dep.params)
        else:
            node.deps.append(dep.def_path)
    for out in stage.outs:
        node.outs.append(out.def_path)
        if not out.use_cache:
            node.uncached.add(out.def_path)
        if out.plot:
            node.plots[out.def_path] = out.plot
    return node


def inside(path: str, folder: str) -> bool:
    return PurePosixPath(path).is_relative_to(folder)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_all_stages_with_their_entries(profile: str) -> None:
    stages = graph(profile)
    assert stages.keys() == STAGES
    for name, node in stages.items():
        entry, _, which = name.partition("@")
        module = entry.replace("-", "_")
        command = f"pipelines.{module} {which}".strip()
        assert node.cmd == f"PYTHONPATH=src python -m {command} --profile {profile}"
        assert (ROOT / "pipelines" / f"{module}.py").is_file()


@pytest.mark.parametrize("profile", PROFILES)
def test_stages_have_the_documented_order(profile: str) -> None:
    stages = graph(profile)
    written_in_order = [name for name in stages if name in CHAIN]
    assert written_in_order == list(CHAIN)
    for earlier, later in [*pairwise(CHAIN), ("stage1", "stage1-control"), ("stage1-control", "coco-eval")]:
        assert reaches(stages, earlier, later), f"{later} does not depend on {earlier}"
    # The control depends only on stage 2's compute, a file that does not depend on loss weights.
    assert set(stages["stage1-control"].deps) & set(stages["stage2"].outs) == {f"runs/{profile}/stage2-compute.json"}


def reaches(stages: dict[str, Node], earlier: str, later: str) -> bool:
    """Whether `later` reads, directly or through others, an output of `earlier`."""
    direct = {
        name
        for name, node in stages.items()
        for out in node.outs
        if any(inside(dep, out) or inside(out, dep) for dep in stages[later].deps)
    }
    return earlier in direct or any(reaches(stages, earlier, name) for name in direct)


@pytest.mark.parametrize("profile", PROFILES)
def test_each_output_has_one_writer(profile: str) -> None:
    outs = [out for node in graph(profile).values() for out in node.outs]
    clashes = [(a, b) for i, a in enumerate(outs) for b in outs[i + 1 :] if inside(a, b) or inside(b, a)]
    assert clashes == []


@pytest.mark.parametrize("profile", PROFILES)
def test_no_dependency_is_a_link_or_a_model(profile: str) -> None:
    """`dvc exp run` commits into git what it finds behind a linked dependency; a model is pinned by parameters."""
    stages = graph(profile)
    made = {out for node in stages.values() for out in node.outs}
    given = {dep for node in stages.values() for dep in node.deps if not any(inside(dep, out) for out in made)}
    for path in (ROOT / dep for dep in given):
        assert path.exists(), path
        found = [path, *path.rglob("*")] if path.is_dir() else [path]
        assert not [file for file in found if file.is_symlink()]
    assert not [dep for dep in given if inside(dep, "models")]
    # Later checkpoints hold what they were made from.
    assert {stage.stage for stage in TABLE if stage.reads(PROFILE_FILE, "model.files")} == {"norm1000", "decode"}


def test_profiles_do_not_share_outputs() -> None:
    outs = [(profile, out) for profile in PROFILES for node in graph(profile).values() for out in node.outs]
    assert all(profile in PurePosixPath(out).parts for profile, out in outs)


@pytest.mark.parametrize("profile", PROFILES)
def test_folders_are_where_the_library_looks(profile: str) -> None:
    paths, stages = ProfilePaths(profile), graph(profile)
    folders = {
        "check": paths.inputs,
        "raw": paths.raw,
        "convert": paths.records,
        "norm1000": paths.norm1000,
        "pack": paths.packed,
        "stage1": paths.run("stage1"),
        "rollout": paths.run("rollout"),
        "stage2": paths.run("stage2"),
        "stage1-control": paths.run("stage1-control"),
        **{f"decode@{name}": paths.decoded(name) for name in CHECKPOINTS},
        "coco-eval": paths.run("eval"),
        "report": paths.reports / "progress.md",
    }
    for name, folder in folders.items():
        assert folder.as_posix() in stages[name].outs, name
    for checkpoint in CHECKPOINTS:
        assert paths.decoded(checkpoint).as_posix() in stages["coco-eval"].deps
        assert checkpoint == "base" or paths.run(checkpoint).as_posix() in stages[f"decode@{checkpoint}"].deps
    # Evaluating other answers, or with other settings, needs no weights.
    weights = {paths.run(checkpoint).as_posix() for checkpoint in CHECKPOINTS[1:]}
    assert weights.isdisjoint(stages["coco-eval"].deps)


@pytest.mark.parametrize("profile", PROFILES)
def test_small_reports_are_kept_by_git_and_the_rest_by_dvc(profile: str) -> None:
    for name, node in graph(profile).items():
        small = {out for out in node.outs if out.startswith(("inputs/", "reports/"))}
        behind = {f"reports/{profile}/{part}" for part in ("details", "figures", "gallery")}  # page one
        assert node.uncached == small - behind, name


@pytest.mark.parametrize("profile", PROFILES)
def test_plots_name_their_columns(profile: str) -> None:
    curves = {path: plot for node in graph(profile).values() for path, plot in node.plots.items()}
    folder = ProfilePaths(profile).reports / "curves"
    assert {Path(path).parent for path in curves} == {folder}
    # With other loss weights, the total is a different quantity; the error in bins is comparable.
    training = {"template": "linear", "x": "step", "y": "coord_diag/expected_bin_mae"}
    for stage in ("stage1", "stage1-control", "stage2"):
        assert curves[f"{folder}/{stage}.tsv"].items() >= training.items()
        template = curves[f"{folder}/{stage}-monitor.tsv"]["template"]
        assert (ROOT / ".dvc" / "plots" / f"{template}.json").is_file()
    assert curves[f"{folder}/pr.tsv"]["template"] == "simple"  # `linear` would smooth precision over recall


@pytest.mark.parametrize("profile", PROFILES)
def test_every_parameter_is_read_by_a_stage(profile: str) -> None:
    """`dvc exp run -S` of a key that no stage reads would be an experiment that changes nothing."""
    params, sizes = load_params(ROOT / "params.yaml"), load_profile(ROOT / "configs" / f"{profile}.yaml")
    for file, block in ((PARAMS_FILE, params), (PROFILE_FILE, sizes)):
        keys = {key for key, _ in leaves(block.model_dump())} - READ_BY_NONE
        assert {key for key in keys if not any(stage.reads(file, key) for stage in TABLE)} == set()


@pytest.mark.parametrize(
    ("key", "readers"),
    [
        ("softce_weight", {"stage2", "report"}),
        ("bbox_ciou_weight", {"stage2", "report"}),
        ("sigma", {"stage1", "stage1-control", "stage2", "report"}),
        ("stage1.softce_weight", {"stage1", "stage1-control", "report"}),
        ("matching.gate", {"stage2", "coco-eval", "report"}),
        ("decode.score", {"coco-eval", "report"}),
        ("decode.grammar", {"rollout", "stage2", "decode", "report"}),
        ("eval.mapping", {"coco-eval", "report"}),
        ("text.object_order", {"norm1000", "stage1", "stage1-control", "stage2", "report"}),
    ],
)
def test_a_parameter_runs_the_stages_that_read_it(key: str, readers: set[str]) -> None:
    assert {stage.stage for stage in TABLE if stage.reads(PARAMS_FILE, key)} == readers
