"""Error causes: TIDE's own numbers on a random data set, and its definitions by hand."""

from __future__ import annotations

import random

import pytest

from coordexp.evaluation.error_causes import Cause, error_metrics, find_causes
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.table import DetectionTable, build_table
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, Prediction

CATEGORIES = tuple(Category(number, f"c{number}") for number in range(1, 5))
# By tidecv 1.0.1, the authors' program, on `random_scenes(4)`: predictions (objects) and cost in AP50.
TIDE = {
    "classification": (52, 0.0997187),
    "localization": (80, 0.1613823),
    "both": (40, 0.0276634),
    "duplicate": (38, 0.0080154),
    "background": (48, 0.0219475),
    "missed": (55, 0.0768360),
}


def random_scenes(seed: int) -> list[ImageResult]:
    """60 images whose predictions are shifted, renamed, doubled and made up."""
    rng, scenes = random.Random(seed), []
    for number in range(1, 61):
        gt, pred = [], []
        for _ in range(rng.randint(0, 6)):
            side = rng.choice([30, 60, 100, 160])
            x, y, label = rng.uniform(0, 640 - side), rng.uniform(0, 480 - side), rng.randint(1, 4)
            gt.append(GroundTruth(f"c{label}", (x, y, x + side, y + side)))
            for _ in range(rng.randint(0, 3)):
                d = rng.choice([0.05, 0.3, 0.6]) * side
                named = label if rng.random() < 0.6 else rng.randint(1, 4)
                left, top = x + rng.uniform(-d, d), y + rng.uniform(-d, d)
                box = (left, top, left + side, top + side)
                pred.append(Prediction(f"c{named}", box, score=rng.random()))
        for _ in range(rng.randint(0, 2)):
            named, x, y = rng.randint(1, 4), rng.uniform(0, 590), rng.uniform(0, 430)
            pred.append(Prediction(f"c{named}", (x, y, x + 50, y + 50), score=rng.random()))
        scenes.append(ImageResult(number, f"{number}.png", 640, 480, tuple(gt), tuple(pred)))
    return scenes


def table_of(results: list[ImageResult]) -> DetectionTable:
    return build_table(results, CATEGORIES, STANDARD)


def test_counts_and_costs_are_tides_own() -> None:
    table = table_of(random_scenes(4))
    metrics = error_metrics(table, find_causes(table))
    for name, (count, cost) in TIDE.items():
        assert metrics[name] == count, name
        assert metrics[f"{name}_cost"] == pytest.approx(cost, abs=1e-6), name


def image(gt: list[GroundTruth], *pred: tuple[str, tuple[float, float, float, float], float]) -> DetectionTable:
    predicted = tuple(Prediction(label, box, score=score) for label, box, score in pred)
    return table_of([ImageResult(1, "1.png", 100, 100, tuple(gt), predicted)])


OBJECT = GroundTruth("c1", (10, 10, 50, 50))
OVER, HALF_OFF, ELSEWHERE = (10.0, 10.0, 50.0, 50.0), (30.0, 10.0, 70.0, 50.0), (60.0, 60.0, 90.0, 90.0)


@pytest.mark.parametrize(
    ("prediction", "cause"),
    [
        (("c1", OVER, 0.5), Cause.RIGHT),
        (("c2", OVER, 0.5), Cause.CLASSIFICATION),
        (("no such label", OVER, 0.5), Cause.CLASSIFICATION),
        (("c1", HALF_OFF, 0.5), Cause.LOCALIZATION),
        (("c2", HALF_OFF, 0.5), Cause.BOTH),
        (("c1", ELSEWHERE, 0.5), Cause.BACKGROUND),
    ],
)
def test_one_prediction_has_the_cause_by_definition(prediction, cause) -> None:
    assert find_causes(image([OBJECT], prediction)).cause_P.tolist() == [cause]


def test_the_lower_score_is_the_duplicate_regardless_of_iou() -> None:
    table = image([OBJECT], ("c1", OVER, 0.4), ("c1", (12.0, 10.0, 52.0, 50.0), 0.6))
    assert find_causes(table).cause_P.tolist() == [Cause.DUPLICATE, Cause.RIGHT]


def test_an_object_is_missed_only_where_no_error_is_near() -> None:
    nothing = image([OBJECT], ("c1", ELSEWHERE, 0.5))
    assert find_causes(nothing).missed_G.tolist() == [True]
    assert find_causes(image([OBJECT], ("c2", OVER, 0.5))).missed_G.tolist() == [False]


def test_predictions_in_crowd_regions_are_not_errors() -> None:
    crowd = GroundTruth("c1", OVER, iscrowd=True)
    causes = find_causes(image([crowd], ("c1", (15.0, 15.0, 30.0, 30.0), 0.5)))
    assert causes.cause_P.tolist() == [Cause.NOT_JUDGED]
    assert not causes.missed_G.any()


def test_without_annotations_costs_are_undefined() -> None:
    table = image([], ("c1", OVER, 0.5))
    metrics = error_metrics(table, find_causes(table))
    assert metrics["background"] == 1
    assert metrics["background_cost"] is None
