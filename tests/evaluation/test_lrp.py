"""LRP by hand: an object missed costs 1, a false box 1, a hit (1 - IoU) / .5."""

from __future__ import annotations

import pytest

from coordexp.records.gt_vs_pred import GroundTruth
from evaluation.builders import CAT, DOG, box, image, perfect_zoo, pred, run, shifted, with_predictions

IOU_5_PX = 35**2 / (2 * 40**2 - 35**2)


def lrp(results, categories=(CAT,)) -> tuple:
    confidence = run(results, categories).metrics["confidence"]
    return tuple(confidence[key] for key in ("lrp", "lrp_loc", "lrp_fp", "lrp_fn"))


def test_perfect_and_silent():
    assert run(perfect_zoo()).metrics["confidence"]["lrp"] == pytest.approx(0)
    assert run(with_predictions(perfect_zoo(), lambda p: [])).metrics["confidence"]["lrp"] == 1


def test_boxes_shifted_by_5_px_cost_their_localisation_alone():
    results = [image(i, [("cat", box(0, 0))], [pred("cat", shifted(box(0, 0), 5, 5))]) for i in range(4)]
    assert lrp(results) == pytest.approx(((1 - IOU_5_PX) / 0.5, 1 - IOU_5_PX, 0, 0))


def test_a_cut_between_right_and_wrong_scores_costs_nothing():
    right, wrong = pred("cat", box(0, 0), 0.9), pred("cat", box(3, 3), 0.2)
    assert lrp([image(1, [("cat", box(0, 0))], [right, wrong])]) == pytest.approx((0, 0, 0, 0))


def test_equal_scores_cannot_be_cut_apart():
    """One hit, one false box of the same score: 1 error over 1 object and 1 false box."""
    both = [pred("cat", box(0, 0), 0.5), pred("cat", box(3, 3), 0.5)]
    assert lrp([image(1, [("cat", box(0, 0))], both)]) == pytest.approx((1 / 2, 0, 1 / 2, 0))


def test_one_of_two_missed_and_one_invented():
    """Cut below both: 1 hit, 1 false, 1 missed gives 2/3; cut between them: 1 missed of 2 objects gives 1/2."""
    objects = [("cat", box(0, 0)), ("cat", box(1, 0))]
    found = [pred("cat", box(0, 0), 0.9), pred("cat", box(3, 3), 0.4)]
    assert lrp([image(1, objects, found)]) == pytest.approx((1 / 2, 0, 0, 1 / 2))
    found = [pred("cat", box(0, 0), 0.4), pred("cat", box(3, 3), 0.9)]
    assert lrp([image(1, objects, found)]) == pytest.approx((2 / 3, 0, 1 / 2, 1 / 2))


def test_mean_over_categories_with_objects():
    results = [image(1, [("cat", box(0, 0))], [pred("cat", box(0, 0))]), image(2, [("dog", box(0, 0))], [])]
    assert lrp(results, (CAT, DOG)) == pytest.approx((1 / 2, 0, 0, 1 / 2))


def test_a_box_in_a_crowd_region_costs_nothing():
    crowd = GroundTruth("cat", (100.0, 100.0, 300.0, 300.0), iscrowd=True)
    inside = pred("cat", (110.0, 120.0, 150.0, 160.0), 0.95)
    assert lrp([image(1, [("cat", box(0, 0)), crowd], [pred("cat", box(0, 0)), inside])])[0] == pytest.approx(0)
