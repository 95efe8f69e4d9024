"""A report on images without a counted object, or on checkpoints that answer nothing: made, and without a claim."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from coordexp.config.paths import CHECKPOINTS
from coordexp.evaluation.effect import Verdict
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult, ParseReport, read_results
from coordexp.records.schema import Record
from coordexp.reporting.inputs import ReportInputs
from coordexp.reporting.page import write_page
from coordexp.reporting.report import build_report
from reporting.synthetic import build_run, changed, everything_said, everything_to_say


def without_objects(record: Record) -> Record:
    return dataclasses.replace(record, objects=())


def crowds_only(record: Record) -> Record:
    crowds = tuple(dataclasses.replace(o, metadata={"iscrowd": 1}) for o in record.objects)
    return dataclasses.replace(record, objects=crowds)


def as_it_is(record: Record) -> Record:
    return record


def as_answered(_checkpoint: str, results: list[ImageResult]) -> list[ImageResult]:
    return results


def silent(_checkpoint: str, results: list[ImageResult]) -> list[ImageResult]:
    return [dataclasses.replace(r, pred=()) for r in results]


Change = Callable[[Record], Record]
Answered = Callable[[str, list[ImageResult]], list[ImageResult]]


@pytest.mark.parametrize(
    ("change", "answered"),
    [(without_objects, as_answered), (without_objects, silent), (crowds_only, as_answered), (as_it_is, silent)],
)
def test_a_report_is_written_and_claims_nothing(change: Change, answered: Answered, tmp_path: Path) -> None:
    inputs = build_run(tmp_path, images=4, resamples=100, gallery_images=4, change=change, answered=answered)
    text = everything_said(build_report(inputs, tmp_path / "report"))
    assert "nan" not in re.findall(r"[a-z]+", text)
    assert "| None" not in text
    for claim in ("is **better**", "is **worse**", "improved:", "fell:"):
        assert claim not in text, claim
    if change is not as_it_is:
        assert "mAP is not defined on this data (n/a against n/a)" in text
        shown = re.findall(r"^\| `(?:coco|f1|known|rollout)\.\S+?` .*$", text, flags=re.MULTILINE)
        assert shown
        assert not [row for row in shown if "1.0000" in row]
    metrics = json.loads(inputs.metrics.read_text(encoding="utf-8"))
    assert all(metrics[name]["eval"]["f1"]["precision_50"] != 1 for name in CHECKPOINTS)
    runs = {n: list(read_results(inputs.evaluations / n / "gt_vs_pred.jsonl")) for n in ("stage1", "stage2")}
    assert write_page(runs, read_categories(inputs.categories), inputs.image_root, tmp_path / "page.html")


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
    run = dataclasses.replace(inputs.run, params=changed(inputs.run.params, stage2__n_softctx_iter=2))
    inputs = dataclasses.replace(inputs, run=run)
    return everything_to_say(inputs)


def test_the_first_lines_describe_the_faults_of_the_answers(text: str) -> None:
    decided, why, *_ = (line for line in text.splitlines()[1:] if line)
    assert decided.startswith("- **No decision**: stage2 cannot be evaluated")
    assert why.startswith("- **stage2 is not evaluated**: 100 % of the answers are truncated at the token budget")
    assert "of the answers loop" in why
    assert "`coordexp ab -S stage2.b_ratio" not in text  # of such answers only how to mend them


def test_no_claim_is_made_about_faulty_answers(text: str) -> None:
    head = text.split("## What costs AP50")[0]
    [against_stage1] = [line for line in head.splitlines() if line.startswith("- Stage 2 against stage 1")]
    assert "**not evaluated**: mAP 0." in against_stage1
    assert "better" not in against_stage1
    assert "F1" not in against_stage1
    assert "- **No decision**: stage2 cannot be evaluated" in head
    assert "- **stage2 against stage1**: not evaluated: `coco.mAP`" in text
    answers = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| Does")}
    assert "**not evaluated**" in answers["| Does stage 2 beat the control?"]
    assert "**not evaluated**" in answers["| Does the score rank well?"]
    for line in text.splitlines():
        if line.startswith("| stage2 - "):
            ends = line.endswith((f"| {Verdict.NOT_JUDGED.value} |", "| not defined |"))
            assert ends or len(line.split("|")) > 9, line
    assert "**stage2 against stage1**: mAP is not evaluated, F1 is not evaluated." in text
    assert "| ? | Stage 2 is not shown to be worse than stage 1 (mAP) |" in text


def test_two_forwards_are_described_as_self_context(text: str) -> None:
    assert (
        "### Stage 2, channel A (text in the ground-truth context, coordinates in the soft self-context of forward 2)"
        in text
    )
    assert "no object was read in both contexts" in text  # the rows of the fixture hold no A2


def test_other_checkpoints_are_still_evaluated(text: str) -> None:
    assert "**stage1 is not evaluated**" not in text


def test_valid_answers_leave_the_first_line_to_the_comparison(report: Path, inputs: ReportInputs) -> None:
    text = report.read_text(encoding="utf-8")
    first = next(line for line in text.splitlines()[1:] if line)
    assert first.startswith("- **")
    assert "stage" in first.lower()
    assert "is not evaluated" not in text
