"""What became of every box, by hand and against the metrics."""

from __future__ import annotations

from typing import Any

import pytest

from coordexp.config.paths import CHECKPOINTS
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.reporting.inputs import ReportInputs, load_report_data
from coordexp.reporting.outcomes import UNKNOWN_NAME, Fate, Outcomes, judge
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


def test_fates_and_discoveries(outcomes: Outcomes) -> None:
    assert [Fate(f) for f in outcomes.fate_P] == [
        Fate.RIGHT,
        Fate.WRONG_NAME,
        Fate.FALSE,
        Fate.WRONG_NAME,
        Fate.WRONG_NAME,
    ]
    assert outcomes.found_G.tolist() == [True, False, False, False, False]


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
        judged, f1 = judge(data.results[name], data.categories), metrics[name]["eval"]["f1"]
        right = int((judged.fate_P == Fate.RIGHT).sum())
        assert (right, len(judged.fate_P) - right) == (f1["tp_50"], f1["fp_50"])
        assert (int(judged.found_G.sum()), int((~judged.found_G).sum())) == (f1["tp_50"], f1["fn_50"])
        located = right + judged.confusions().total()
        assert right / located == pytest.approx(f1["sem_acc_on_matched_50"], abs=5e-5)
