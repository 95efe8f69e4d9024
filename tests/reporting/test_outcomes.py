"""What became of every box, by hand and against the metrics."""

from __future__ import annotations

from typing import Any

import pytest

from coordexp.config.paths import CHECKPOINTS
from coordexp.evaluation.error_causes import ERRORS, Cause
from coordexp.evaluation.table import image_slices
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.reporting.inputs import ReportInputs, load_report_data
from coordexp.reporting.outcomes import UNKNOWN_NAME, Outcomes, judge
from coordexp.reporting.tables import confusion_table

CAT, DOG, EVIL = (0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 40.0, 40.0), (50.0, 50.0, 60.0, 60.0)


def result(image_id: int, gt: list[tuple], pred: list[tuple]) -> ImageResult:
    """One image of 64 x 64 px from (name, box) and (name, box, score)."""
    return ImageResult(
        image_id=image_id,
        image=f"{image_id}.jpg",
        width=64,
        height=64,
        gt=tuple(GroundTruth(name, box) for name, box in gt),
        pred=tuple(Prediction(name, box, (0, 0, 0, 0), score=score) for name, box, score in pred),
        raw_text="",
        parse=ParseReport(True, len(pred)),
        finish_reason="stop",
        n_generated_tokens=1,
    )


@pytest.fixture
def outcomes() -> Outcomes:
    """Right, wrong name, false, unknown name; and an object that nothing found."""
    categories = [Category(1, "cat"), Category(2, "dog"), Category(3, "<b>|`x`")]
    second = result(2, [("dog", DOG), ("cat", CAT)], [("cat", DOG, 0.4), ("zebra", CAT, 0.3)])
    first = result(
        1,
        [("cat", CAT), ("<b>|`x`", EVIL), ("dog", DOG)],
        [("cat", CAT, 0.9), ("dog", EVIL, 0.8), ("dog", (0.0, 50.0, 9.0, 60.0), 0.1)],
    )
    return judge([second, first], categories)


def test_error_types_and_found_objects(outcomes: Outcomes) -> None:
    assert [Cause(cause) for cause in outcomes.cause_P] == [
        Cause.RIGHT,
        Cause.CLASSIFICATION,
        Cause.BACKGROUND,
        Cause.CLASSIFICATION,
        Cause.CLASSIFICATION,
    ]
    assert outcomes.found_G.tolist() == [True, False, False, False, False]


def test_rows_of_every_image_are_those_that_a_column_is_cut_into() -> None:
    counts = [(0, 2), (3, 0), (0, 0), (1, 1), (0, 0)]
    results = [
        result(10 * n, [("cat", CAT)] * gt, [("cat", CAT, 0.5)] * pred) for n, (gt, pred) in enumerate(counts, 1)
    ]
    found = judge(results, [Category(1, "cat")])
    table = found.table
    slices = zip(image_slices(table.pred_image_P, 5), image_slices(table.gt_image_G, 5), strict=True)
    assert [found.of_image(r.image_id) for r in results] == [(r, *s) for r, s in zip(results, slices, strict=True)]


def test_rows_of_an_image(outcomes: Outcomes) -> None:
    shown, preds, objects = outcomes.of_image(2)
    assert shown.image == "2.jpg"
    assert (preds, objects) == (slice(3, 5), slice(3, 5))


def test_confusions(outcomes: Outcomes) -> None:
    assert outcomes.confusions() == {("<b>|`x`", "dog"): 1, ("dog", "cat"): 1, ("cat", UNKNOWN_NAME): 1}
    assert outcomes.named_right() == {"cat": 1}


def test_names_are_escaped_in_the_table(outcomes: Outcomes) -> None:
    assert r"| &lt;b&gt;\|\`x\` | dog | 1 |" in confusion_table(outcomes)


def test_counts_are_those_of_the_metrics(inputs: ReportInputs, metrics: dict[str, Any]) -> None:
    data = load_report_data(inputs)
    for name in CHECKPOINTS:
        judged, errors = judge(data.results[name], data.categories), metrics[name]["eval"]["errors"]
        counted = {cause.name.lower(): int((judged.cause_P == cause).sum()) for cause in ERRORS}
        assert counted == {key: errors[key] for key in counted}
        assert int(judged.found_G.sum()) == int((judged.cause_P == Cause.RIGHT).sum())
