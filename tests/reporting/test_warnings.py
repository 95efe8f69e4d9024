"""A checkpoint whose answers loop, are cut or do not parse: said first, and nothing is claimed of it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest

from coordexp.records.gt_vs_pred import ImageResult, ParseReport
from coordexp.reporting.inputs import ReportInputs
from coordexp.reporting.report import build_report
from reporting.synthetic import build_run


def looping(checkpoint: str, results: list[ImageResult]) -> list[ImageResult]:
    """Stage 2 finds what it finds, says its last object until it is cut, and is far better by mAP than all others."""
    if checkpoint != "stage2":
        return [dataclasses.replace(r, pred=r.pred[:1]) for r in results]
    cut = ParseReport(container_found=True, n_valid=9, truncated=True)
    return [
        dataclasses.replace(r, pred=(*r.pred, *r.pred[-1:] * 40), parse=cut, finish_reason="length") for r in results
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("loops")
    inputs = build_run(root, images=16, gallery_images=4, answered=looping)
    params = copy.deepcopy(dict(inputs.params))
    params["stage2"]["n_softctx_iter"] = 2
    inputs = dataclasses.replace(inputs, params=params)
    return build_report(inputs, root / "report").read_text(encoding="utf-8")


def test_the_first_line_says_how_the_answers_fail(text: str) -> None:
    first = next(line for line in text.splitlines()[1:] if line)
    assert first.startswith("- **stage2 is not judged**: 100 % of the answers are cut at the token budget")
    assert "of the answers loop" in first


def test_nothing_is_claimed_of_it(text: str) -> None:
    head = text.split("## 1.")[0]
    [against_stage1] = [line for line in head.splitlines() if line.startswith("- Stage 2 against stage 1")]
    assert "**not judged**: mAP 0." in against_stage1
    assert "better" not in against_stage1
    assert "F1" not in against_stage1
    assert "- **stage2 against stage1**: not judged: `coco.mAP`" in head
    answers = {line.split(" | ")[0]: line for line in head.splitlines() if line.startswith("| Does")}
    assert "**not judged**" in answers["| Does stage 2 beat the control?"]
    assert "**not judged**" in answers["| Does the score rank well?"]
    for line in text.splitlines():
        if line.startswith("| stage2 - "):
            assert line.endswith("| not judged |") or "| not defined |" in line or len(line.split("|")) > 9, line
    assert "**stage2 against stage1**: mAP is not judged, F1 is not judged." in text
    assert "| ? | Stage 2 is not shown to be worse than stage 1 (mAP) |" in text


def test_two_forwards_are_not_called_the_ground_truth_context(text: str) -> None:
    assert (
        "### Stage 2, channel A (text in the ground-truth context, coordinates in the soft self-context of forward 2)"
        in text
    )
    assert "no step logs the first forward beside the last" in text


def test_other_checkpoints_are_judged_as_ever(text: str) -> None:
    assert "Stage 1 against the base model is **not judged**" not in text


def test_sound_answers_leave_the_first_line_to_the_comparison(report: Path, inputs: ReportInputs) -> None:
    text = report.read_text(encoding="utf-8")
    first = next(line for line in text.splitlines()[1:] if line)
    assert "mAP" in first
    assert "is not judged" not in text.split("## 1.")[0]
