"""The reference pages say what the code says, and the committed ones are up to date."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

from coordexp.config.block import field_specs
from coordexp.config.paths import CHECKPOINTS, ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.removed import REMOVED
from coordexp.config.schema import Params
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.registry import metric_specs, view
from coordexp.inputs import Declaration, StagePlan, stage_plans
from coordexp.losses.coord_terms import CoordSlots, slot_diagnostics
from coordexp.reporting.markdown import number
from coordexp.reporting.questions import INDEX
from coordexp.reporting.reference import (
    BEGIN,
    END,
    METRICS_PAGE,
    PARAMETERS_PAGE,
    PRODUCTION_PAGE,
    README,
    SCALING_PAGE,
    SHOWN_PROFILE,
    Graph,
    metrics_markdown,
    pages,
    parameters_markdown,
)
from helpers import PARAMS

DVC_YAML = """
stages:
  train: {cmd: "train ${profile}", deps: [data], outs: ["runs/${profile}/train"]}
  decode:
    foreach: [one, two]
    do: {cmd: "decode ${item}", deps: ["runs/${profile}/train"], outs: ["answers/${item}"]}
  extra:
    foreach: {a: {reads: "${profile}"}, b: {reads: two}}
    do: {cmd: "${key} ${item.reads}", deps: ["answers/${item.reads}/file"], outs: ["extra/${key}"]}
  judge: {cmd: judge, deps: [answers/one, extra/a], metrics: [metrics.json: {cache: false}]}
"""
GRAPH = Graph(
    (
        Declaration("train", ("softce_weight", "matching"), ("stage1",)),
        Declaration("decode", ("decode",), ()),
        Declaration("extra", (), ("report",)),
        Declaration("judge", ("matching.gate",), ("eval.images",)),
    ),
    {
        "train": StagePlan("train", frozenset({"data"}), frozenset({"model"})),
        "decode@one": StagePlan("decode", frozenset({"model/file"}), frozenset({"answers/one"})),
        "decode@two": StagePlan("decode", frozenset({"model/file"}), frozenset({"answers/two"})),
        "extra@a": StagePlan("extra", frozenset({"answers/one"}), frozenset({"extra/a"})),
        "extra@b": StagePlan("extra", frozenset({"data"}), frozenset({"extra/b"})),
        "judge": StagePlan("judge", frozenset({"answers"}), frozenset({"metrics.json"})),
    },
)


def rows(page: str) -> dict[str, list[str]]:
    """First cell -> the other cells of every table row, as a browser shows them; rows of one key are joined."""
    shown = MarkdownIt("commonmark").enable("table").render(page)
    found: dict[str, list[str]] = {}
    for row in re.findall(r"<tr>(.*?)</tr>", shown, flags=re.DOTALL):
        cells = [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        if cells:  # else it is the header
            found.setdefault(cells[0], []).extend(cells[1:])
    return found


@pytest.mark.parametrize("page", [PARAMETERS_PAGE, METRICS_PAGE, README, PRODUCTION_PAGE, SCALING_PAGE, INDEX])
def test_committed_pages_are_up_to_date(repository: Path, page: Path) -> None:
    expected = pages(repository)[page]
    assert (repository / page).read_text(encoding="utf-8") == expected, "run `python -m coordexp.reporting.reference`"


def _stands(line: str, value: float) -> bool:
    """Whether a row of a table shows a number: with an interval in the digits that this carries."""
    return number(value) in line or any(f"{value:.{digits}f} [" in line for digits in (2, 3))


def test_the_results_of_the_readme_are_those_of_the_headline_in_git(repository: Path) -> None:
    block = (repository / README).read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    shown = {cells[1].strip(): line for line in block.splitlines() if len(cells := line.split("|")) > 2}
    headline = json.loads((ProfilePaths(SHOWN_PROFILE, repository).reports / "headline.json").read_text("utf-8"))
    missing = {
        (checkpoint, key)
        for checkpoint in headline.keys() & set(CHECKPOINTS)
        for key in {*view("headline", STANDARD)} & {*view("readme", STANDARD)}
        if not _stands(shown[checkpoint], headline[checkpoint]["eval"][key.split(".")[0]][key.split(".")[1]])
    }
    assert missing == set(), "run `python -m coordexp.reporting.reference` where the run's outputs are"


def test_every_parameter_and_removed_key_is_on_the_page_with_the_text_of_the_loader() -> None:
    shown = rows(parameters_markdown(GRAPH))
    for spec in [*field_specs(Params), *field_specs(Profile)]:
        if spec.key != "source.kind":  # stands in the title of its table
            assert shown[spec.key][:2] == [spec.description, spec.expected]
    for key, remedy in REMOVED.items():
        assert shown[key] == [remedy.replace("`", "")]


def test_a_key_names_the_stages_that_read_it_or_its_block_and_those_that_come_after() -> None:
    shown = rows(parameters_markdown(GRAPH))
    touched = {key: tuple(cells[2:]) for key, cells in shown.items() if len(cells) == 4}
    assert touched["softce_weight"] == ("train", "decode, extra@a, judge")
    assert touched["matching.gate"] == ("train, judge", "decode, extra@a")
    assert touched["matching.gate_threshold"] == ("train", "decode, extra@a, judge")
    assert touched["decode.box"] == ("decode", "extra@a, judge")
    assert touched["report.gallery_images"] == ("extra", "")
    assert touched["stage1.softce_weight"] == ("", "")  # the block of that name is read in the other file
    assert touched["stage1.lr"] == ("train", "decode, extra@a, judge")
    assert touched["eval.images"] == ("judge", "")


def test_the_stages_of_dvc_yaml_have_the_names_and_paths_that_dvc_gives_them(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    plans = stage_plans(tmp_path, "tiny")
    assert list(plans) == ["train", "decode@one", "decode@two", "extra@a", "extra@b", "judge"]
    assert plans["decode@two"] == StagePlan("decode two", frozenset({"runs/tiny/train"}), frozenset({"answers/two"}))
    assert plans["extra@a"].deps == {"answers/tiny/file"}
    assert plans["extra@b"] == StagePlan("b two", frozenset({"answers/two/file"}), frozenset({"extra/b"}))
    assert plans["judge"].outs == {"metrics.json"}


def test_every_metric_is_on_the_page() -> None:
    shown = rows(metrics_markdown())
    for spec in metric_specs(STANDARD).values():
        better = "" if spec.better == "neither" else spec.better
        assert shown[spec.key] == [spec.meaning, spec.unit, better]


def test_every_logged_diagnostic_is_on_the_page() -> None:
    target_bins = torch.tensor([1.0, 500.25, 999.0])
    slots = CoordSlots(torch.zeros(3, 1000), torch.zeros(3), target_bins, PARAMS)
    logged = slot_diagnostics(slots).summary()
    on_page = {key.removeprefix("coord_diag/") for key in rows(metrics_markdown()) if key.startswith("coord_diag/")}
    assert on_page == set(logged)
