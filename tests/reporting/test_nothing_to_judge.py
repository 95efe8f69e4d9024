"""A report on images without a counted object, or on checkpoints that answer nothing: made, and without a claim."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from coordexp.config.paths import CHECKPOINTS
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.records.schema import Record
from coordexp.reporting.curves import write_curves
from coordexp.reporting.page import write_page
from coordexp.reporting.readme import results_table
from coordexp.reporting.report import build_report
from reporting.synthetic import build_run


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
def test_everything_is_written_and_nothing_is_perfect(change: Change, answered: Answered, tmp_path: Path) -> None:
    inputs = build_run(tmp_path, images=4, resamples=100, gallery_images=4, change=change, answered=answered)
    text = build_report(inputs, tmp_path / "report").read_text(encoding="utf-8")
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
    write_curves(inputs, tmp_path / "curves")
    files = [inputs.evaluations / name / "gt_vs_pred.jsonl" for name in ("stage1", "stage2")]
    assert write_page(files, read_categories(inputs.categories), inputs.image_root, tmp_path / "page.html")
    assert "| stage2 | n/a" in results_table("tiny", tmp_path) or change is as_it_is
