"""The tables of decoding choices: every alternative evaluated as if it had been the choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordexp.config.loading import load_params
from coordexp.errors import DataError
from coordexp.evaluation.decoding_study import between_runs, box_table, score_table, with_score
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from evaluation.builders import run

CATEGORIES = [Category(1, "cat")]
PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
TRUE, SHIFTED, WRONG = (10.0, 10.0, 50.0, 50.0), (14.0, 10.0, 54.0, 50.0), (60.0, 60.0, 90.0, 90.0)


def line(image_id: int) -> ImageResult:
    """A right box that argmax shifts, and a wrong one that the log-probability prefers."""
    right = Prediction("cat", SHIFTED, (0, 0, 1, 1), score=0.2, boxes_xyxy_px={"argmax": SHIFTED, "median": TRUE})
    wrong = Prediction("cat", WRONG, (0, 0, 1, 1), score=0.9, boxes_xyxy_px={"argmax": WRONG, "median": WRONG})
    right = replace(right, scores={"coord_logprob": 0.2, "quality": 0.9})
    wrong = replace(wrong, scores={"coord_logprob": 0.9, "quality": 0.1})
    return ImageResult(
        image_id, "1.png", 100, 100, (GroundTruth("cat", TRUE),), (right, wrong), "", ParseReport(True, 2), "stop", 1
    )


LINES = [line(i) for i in range(6)]


def test_a_better_box_shows_in_the_table() -> None:
    argmax, median = box_table(LINES, CATEGORIES, PARAMS)
    assert (argmax["name"], median["name"]) == ("argmax", "median")
    assert argmax["coco.AP90"] == 0
    assert median["coco.AP90"] > 0.4
    assert "difference" not in argmax
    assert median["difference"]["coco.mAP"]["lo"] > 0


def test_a_better_ranking_shows_in_the_table() -> None:
    plain, quality = score_table(LINES, CATEGORIES, PARAMS)
    assert plain["coco.AP50"] == pytest.approx(0.5, abs=0.01)
    assert quality["coco.AP50"] == pytest.approx(1.0)


def test_a_row_equals_the_evaluation_of_the_changed_predictions() -> None:
    changed = [replace(r, pred=tuple(with_score(p, "quality") for p in r.pred)) for r in LINES]
    row = score_table(LINES, CATEGORIES, PARAMS)[1]
    assert row["coco.mAP"] == run(changed, CATEGORIES).value("coco.mAP")


def test_runs_are_compared_with_their_baseline_and_keep_their_own_columns() -> None:
    runs = {"off": LINES, "on": [replace(r, pred=r.pred[:1]) for r in LINES]}
    off, on = between_runs(runs, "off", CATEGORIES, PARAMS, {"on": {"tokens_per_second": 7}})
    assert "tokens_per_second" not in off
    assert on["tokens_per_second"] == 7
    assert on["difference"]["coco.AP50"]["delta"] == pytest.approx(on["coco.AP50"] - off["coco.AP50"])


def test_files_without_alternatives_are_refused() -> None:
    bare = [replace(r, pred=tuple(replace(p, scores={}) for p in r.pred)) for r in LINES]
    with pytest.raises(DataError, match="no alternative `scores`"):
        score_table(bare, CATEGORIES, PARAMS)
