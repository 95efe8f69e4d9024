"""Coordinate figures: errors in bins by hand, and strips chosen by rule."""

from __future__ import annotations

import numpy as np

from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.reporting.figures_coordinates import RULES, bin_errors, choose_strips
from coordexp.reporting.outcomes import Outcomes, judge


def outcome(n_images: int, *, distributions: bool) -> Outcomes:
    """Images of 200 x 100 px; the box of image i is i px off at its left edge, and i + 1 bins wide in spirit."""
    results = []
    for i in range(1, n_images + 1):
        truth, box = (20.0, 10.0, 120.0, 90.0), (20.0 + i, 10.0, 120.0, 90.0)
        extra = {"coord_sd_bins": (10.0 * i, 1.0, 1.0, 1.0), "boxes_xyxy_px": {"expectation": box}}
        pred = Prediction("cat", box, (100 + 5 * i, 100, 600, 900), score=0.5, **(extra if distributions else {}))
        results.append(
            ImageResult(
                i, f"{i}.jpg", 200, 100, (GroundTruth("cat", truth),), (pred,), "", ParseReport(True, 1), "stop", 9
            )
        )
    return judge(results, [Category(1, "cat")])


def test_an_error_of_one_pixel_in_two_hundred_is_five_bins() -> None:
    np.testing.assert_allclose(bin_errors(outcome(2, distributions=False)), [[5, 0, 0, 0], [10, 0, 0, 0]])


def test_strips_follow_their_rules_and_show_a_box_once() -> None:
    strips = choose_strips(outcome(8, distributions=True), per_rule=1)
    assert [s.rule for s in strips] == list(RULES)
    assert len({s.image_id for s in strips}) == 4
    widest, largest = strips[0], strips[1]
    assert (widest.image_id, widest.slot, widest.sd_bins) == (8, "x1", 80.0)
    assert (largest.image_id, largest.emitted_bin - largest.true_bin) == (7, 35.0)  # 8 is taken


def test_no_distribution_on_file_gives_no_strip() -> None:
    assert choose_strips(outcome(3, distributions=False)) == []
