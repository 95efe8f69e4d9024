"""Measures by hand, and resamples that equal measures of repeated images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordexp.evaluation.bootstrap import resample_weights
from coordexp.evaluation.comparison import Reading, paired_effect, reading, reading_effect
from coordexp.evaluation.measures import MEASURES, matched_ious
from evaluation.builders import ANIMALS, box, image, perfect_zoo, pred, random_results, run, shifted, table_of


def value(key: str, results, categories=ANIMALS) -> float:
    statistic = MEASURES[key].statistic(table_of(results, categories))
    return float(statistic(np.ones((1, len(results))))[0])


def test_geometry_by_hand():
    at = box(0, 0)  # 40 x 40 px of 400
    results = [image(1, [("cat", at), ("dog", box(2, 0))], [pred("dog", shifted(at, 10, 0))])]  # names do not matter
    iou = 30 / 50
    assert value("geometry.iou", results) == pytest.approx(iou)
    assert value("geometry.giou_loss", results) == pytest.approx(1 - iou)  # the hull is the union
    assert value("geometry.bin_error", results) == pytest.approx(10 / 400 * 1000 / 2)  # two of four edges are off
    assert (value("geometry.iou_75", results), value("geometry.iou_90", results)) == (0, 0)
    assert value("geometry.iou_75", perfect_zoo()) == 1
    assert matched_ious(table_of(results)).tolist() == pytest.approx([iou])
    assert np.isnan(value("geometry.iou", [image(1, [("cat", at)], [])]))


def test_coordinates_near_a_boundary_and_near_a_center_are_separated():
    """An image of 1000 px has one bin a pixel: 10.5 is between two bins, 20 is the centre of one."""
    near, central = (10.5, 20.0, 110.0, 120.0), (200.0, 300.0, 300.0, 400.0)
    answers = [pred("cat", (13.5, 20.0, 110.0, 120.0)), pred("dog", shifted(central, 1.0, 1.0))]
    results = [image(1, [("cat", near), ("dog", central)], answers, size=(1000, 1000))]
    assert value("geometry.boundary_excess", results) == pytest.approx(3.0 - (0 * 3 + 1 * 4) / 7)
    assert np.isnan(value("geometry.boundary_excess", [image(1, [("cat", central)], answers[1:], size=(1000, 1000))]))


def test_stopping_and_crowds_by_hand():
    many = [("cat", box(c, r)) for c in range(6) for r in range(2)]
    results = [
        image(1, many, [pred("cat", at) for _, at in many[:3]]),
        image(2, [("dog", box(0, 0))], [pred("dog", box(0, 0)), pred("dog", box(3, 3)), pred("owl", box(4, 4))]),
        image(3, [("dog", box(0, 0))], [pred("dog", box(0, 0))]),
    ]
    assert value("set.crowded_recall", results) == pytest.approx(3 / 12)
    assert value("set.count_error_abs", results) == pytest.approx((9 + 2 + 0) / 3)
    assert (value("set.stops_early", results), value("set.stops_late", results)) == pytest.approx((1 / 3, 1 / 3))


@pytest.mark.parametrize("key", MEASURES)
def test_a_resample_is_the_measure_of_the_images_as_often_as_they_are_drawn(key):
    results, categories = random_results(3, n_images=8, max_gt=14)
    statistic = MEASURES[key].statistic(table_of(results, categories))
    for weights in resample_weights(8, 5, 1):
        drawn = [
            replace(result, image_id=1000 * result.image_id + n)
            for result, times in zip(results, weights, strict=True)
            for n in range(times)
        ]
        np.testing.assert_allclose(statistic(weights[None])[0], value(key, drawn, categories), equal_nan=True)


def test_a_measure_is_compared_as_a_metric_is():
    results, categories = random_results(5, n_images=20)
    ours, theirs = run(results, categories), run([replace(r, pred=r.pred[:1]) for r in results], categories)
    for key in ("geometry.iou", "coco.mAP", "set.dup_pairs_90"):
        found = paired_effect([ours], [theirs], key)
        readings = [reading(e, key) for e in (ours, theirs)]
        assert all(isinstance(one, Reading) for one in readings)
        assert found.delta == pytest.approx(readings[0].value - readings[1].value)
        alone = reading_effect([readings[0]], 0.25)
        assert alone.delta == pytest.approx(readings[0].value - 0.25)
        assert alone.lo < alone.delta < alone.hi or key == "set.dup_pairs_90"
    nothing = run([replace(r, pred=()) for r in results], categories)
    assert reading(nothing, "geometry.iou") is None
    assert paired_effect([ours], [nothing], "geometry.iou") is None
