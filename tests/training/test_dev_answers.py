"""Counts over dev answers against a hand-computed case, and the figure of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from coordexp.drawing.panels import FALSE, MISSED, RIGHT
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.training.dev_answers import count_answers, draw_answers, duplicate_pairs, judge_answer


def answer(gt: list[GroundTruth], pred: list[tuple[str, tuple[float, ...]]], parse: ParseReport) -> ImageResult:
    found = tuple(Prediction(name, box, (0, 0, 1, 1), score=0.5) for name, box in pred)
    return ImageResult(1, "a.png", 100, 80, tuple(gt), found, "", parse, "stop", 10)


CAT, DOG, CUP = (10.0, 10.0, 40.0, 40.0), (50.0, 10.0, 90.0, 50.0), (10.0, 50.0, 30.0, 70.0)
NEAR_CAT = (10.0, 10.0, 40.0, 38.0)  # IoU with CAT: 28 / 30
TWO = answer(
    [GroundTruth("cat", CAT), GroundTruth("dog", DOG), GroundTruth("cup", CUP), GroundTruth("crowd", DOG, True)],
    # Found under another spelling, doubled, the right place under a wrong name, nothing at all.
    [("Cat", CAT), ("cat", NEAR_CAT), ("pig", DOG), ("cup", (70.0, 60.0, 90.0, 75.0))],
    ParseReport(True, 4),
)
NONE = answer([GroundTruth("cat", CAT)], [], ParseReport(True, 0, {"bbox_invalid": 1}, truncated=True))


def test_counts_by_hand() -> None:
    counts = count_answers([judge_answer(TWO), judge_answer(NONE)])
    assert counts == {
        "images": 2,
        "objects": 4,  # the crowd is none
        "predictions": 4,
        "right": 1,
        "false": 3,
        "missed": 3,
        "precision": 0.25,
        "recall": 0.25,
        "f1": 0.25,
        "f1_boxes": 0.5,  # cat and dog are located
        "matched_iou_mean": 1.0,
        "dup_pairs_90": 1,
        "parse_rate": 0.5,
        "truncated": 1,
        "tokens_mean": 10.0,
    }


def test_without_objects_all_ratios_are_undefined() -> None:
    """With only a crowd region, neither an empty answer nor a box defines a ratio of objects."""
    crowd = [GroundTruth("crowd", DOG, True)]
    for found in ([], [("cat", CAT)]):
        counts = count_answers([judge_answer(answer(crowd, found, ParseReport(True, len(found))))])
        assert [counts[key] for key in ("recall", "f1", "f1_boxes", "matched_iou_mean")] == [None] * 4
        assert counts["precision"] == (0 if found else None)


def test_duplicates_share_a_name_and_nearly_the_same_box() -> None:
    nothing = ParseReport(True, 0)
    assert duplicate_pairs(answer([], [("cat", CAT), ("dog", CAT)], nothing)) == 0
    assert duplicate_pairs(answer([], [("cat", CAT), ("cat", (10.0, 10.0, 40.0, 36.0))], nothing)) == 0  # 26 / 30
    assert duplicate_pairs(answer([], [("cat", CAT)] * 3, nothing)) == 3
    assert duplicate_pairs(answer([], [], nothing)) == 0


def test_the_figure_marks_correct_false_and_missed_objects(tmp_path: Path) -> None:
    Image.new("RGB", (100, 80), "white").save(tmp_path / "a.png")
    one = draw_answers([judge_answer(TWO)], tmp_path, "after step 7")
    two = draw_answers([judge_answer(TWO), judge_answer(NONE), judge_answer(NONE)], tmp_path, "after step 7")
    assert two.width == 2 * one.width + 6
    assert two.height == 2 * one.height + 6
    pixels = {tuple(p) for p in np.asarray(one).reshape(-1, 3).tolist()}
    assert {RIGHT.colour, FALSE.colour, MISSED.colour} <= pixels
