"""Blind controls: their predictions, and that only a detector that uses the image exceeds them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from coordexp.evaluation.blind import MARGIN, constant_answer, dealt_answers, learned_nothing, median_boxes
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.protocol import STANDARD, STANDARD_MATCHING
from coordexp.evaluation.table import build_table
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, Prediction

CATEGORIES = (Category(1, "raccoon"), Category(2, "fox"))
PARAMS = STANDARD.model_copy(update={"bootstrap_resamples": 200})


def photos(n: int, spread: float) -> list[ImageResult]:
    """One raccoon each near the middle of photos of two sizes, every fourth one a fox; nothing predicted."""
    rng, found = random.Random(1), []
    for number in range(1, n + 1):
        width, height = rng.choice([(200, 100), (400, 300)])
        x, y = rng.uniform(0.2 - spread, 0.2 + spread), rng.uniform(0.2 - spread, 0.2 + spread)
        box = (x * width, y * height, (x + 0.5) * width, (y + 0.5) * height)
        label = "fox" if number % 4 == 0 else "raccoon"
        found.append(ImageResult(number, f"{number}.jpg", width, height, (GroundTruth(label, box),), ()))
    return found


def looking(results: list[ImageResult]) -> list[ImageResult]:
    return [replace(r, pred=tuple(Prediction(g.desc, g.bbox_xyxy_px, score=0.9) for g in r.gt)) for r in results]


def test_the_constant_control_is_the_most_frequent_label_at_its_median_position() -> None:
    table = build_table(photos(40, 0.1), CATEGORIES, PARAMS)
    control = constant_answer(table)
    assert len(control.pred_score_P) == table.n_images
    assert set(control.pred_category_P.tolist()) == {0}
    raccoons = (table.gt_category_G == 0).nonzero()[0]
    scale = np.tile(table.sizes_wh_I2[table.gt_image_G[raccoons]], (1, 2))
    median = np.median(table.gt_boxes_G4[raccoons] / scale, axis=0)
    np.testing.assert_allclose(control.pred_boxes_P4 / np.tile(table.sizes_wh_I2, (1, 2)), np.tile(median, (40, 1)))
    assert sorted(set(median_boxes(table).pred_score_P.tolist())) == [0.25, 0.75]


def test_shuffling_gives_every_answer_once_to_another_image() -> None:
    table = build_table(looking(photos(30, 0.1)), CATEGORIES, PARAMS)
    dealt = dealt_answers(table, seed=5)
    own = table.pred_boxes_P4 / np.tile(table.sizes_wh_I2, (1, 2))
    given = dealt.pred_boxes_P4 / np.tile(table.sizes_wh_I2, (1, 2))
    np.testing.assert_allclose(np.sort(own, axis=0), np.sort(given, axis=0))
    assert not np.isclose(own, given).all(axis=1).any()


def test_a_constant_answer_shows_no_learning_and_a_detector_does() -> None:
    results = photos(60, 0.15)
    box = (0.2, 0.2, 0.7, 0.7)
    blind = [
        replace(r, pred=(Prediction("raccoon", tuple(v * s for v, s in zip(box, (r.width, r.height) * 2, strict=True)),
                                    score=0.9),)) for r in results
    ]  # fmt: skip
    of_blind, of_looking = (
        evaluate(rows, CATEGORIES, PARAMS, STANDARD_MATCHING, 3) for rows in (blind, looking(results))
    )
    verdicts = [learned_nothing(e.value(MARGIN), e.metrics["interval"][MARGIN]) for e in (of_blind, of_looking)]
    assert "best blind control" in verdicts[0]
    assert verdicts[1] == ""
    assert of_looking.value("coco.AP50") == pytest.approx(1.0)


def test_undefined_without_objects_and_for_one_image() -> None:
    empty = evaluate([replace(r, gt=()) for r in photos(3, 0.1)], CATEGORIES, PARAMS, STANDARD_MATCHING, 3)
    assert set(empty.metrics["blind"].values()) == {None}
    one = evaluate(looking(photos(1, 0.1)), CATEGORIES, PARAMS, STANDARD_MATCHING, 3)
    assert one.metrics["blind"]["dealt_AP50"] is None
    assert one.metrics["blind"]["constant_AP50"] == pytest.approx(1.0)
