"""The reference pages say what the code says, and the committed ones are up to date."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

from coordexp.config.block import field_specs
from coordexp.config.profile import Profile
from coordexp.config.removed import REMOVED
from coordexp.config.schema import Params
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.registry import metric_specs
from coordexp.inputs import Declaration
from coordexp.losses.coord_terms import CoordSlots, slot_diagnostics
from coordexp.reporting.reference import (
    METRICS_PAGE,
    PARAMETERS_PAGE,
    PICTURE,
    PRODUCTION_PAGE,
    README,
    SCALING_PAGE,
    SHOWN_PROFILE,
    metrics_markdown,
    pages,
    parameters_markdown,
    shown_picture,
)
from helpers import PARAMS

STAGES = [
    Declaration("train", ("softce_weight", "matching"), ("stage1",)),
    Declaration("judge", ("matching.gate",), ("eval.images",)),
]


def rows(page: str) -> dict[str, list[str]]:
    """First cell -> the other cells of every table row, as a browser shows them; rows of one key are joined."""
    shown = MarkdownIt("commonmark").enable("table").render(page)
    found: dict[str, list[str]] = {}
    for row in re.findall(r"<tr>(.*?)</tr>", shown, flags=re.DOTALL):
        cells = [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        if cells:  # else it is the header
            found.setdefault(cells[0], []).extend(cells[1:])
    return found


@pytest.mark.parametrize("page", [PARAMETERS_PAGE, METRICS_PAGE, README, PRODUCTION_PAGE, SCALING_PAGE])
def test_committed_pages_are_up_to_date(repository: Path, page: Path) -> None:
    expected = pages(repository)[page]
    assert (repository / page).read_text(encoding="utf-8") == expected, "run `python -m coordexp.reporting.reference`"


def test_the_picture_of_the_readme_is_one_of_the_committed_gallery(repository: Path) -> None:
    expected = shown_picture(SHOWN_PROFILE, repository)
    assert (repository / PICTURE).read_bytes() == expected, "run `python -m coordexp.reporting.reference`"
    assert f"({PICTURE})" in (repository / README).read_text(encoding="utf-8")


def test_every_parameter_and_removed_key_is_on_the_page_as_the_loader_words_it() -> None:
    shown = rows(parameters_markdown(STAGES))
    for spec in [*field_specs(Params), *field_specs(Profile)]:
        if spec.key != "source.kind":  # stands in the title of its table
            assert shown[spec.key][:2] == [spec.description, spec.expected]
    for key, remedy in REMOVED.items():
        assert shown[key] == [remedy.replace("`", "")]


def test_a_key_names_the_stages_that_read_it_or_its_block() -> None:
    shown = rows(parameters_markdown(STAGES))
    readers = {key: cells[-1] for key, cells in shown.items() if len(cells) == 3}
    assert readers["softce_weight"] == "train"
    assert readers["matching.gate"] == "train, judge"
    assert readers["matching.gate_threshold"] == "train"
    assert readers["stage1.softce_weight"] == ""  # the block of that name is read in the other file
    assert readers["stage1.lr"] == "train"
    assert readers["eval.images"] == "judge"
    assert readers["sigma"] == ""


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
