from __future__ import annotations

import numpy as np
import pytest

from coordexp.evaluation.set_behaviour import find_duplicates, first_of_duplicates
from coordexp.evaluation.table import image_slices
from coordexp.geometry.boxes import pairwise_iou
from evaluation.builders import ANIMALS, box, image, pred, random_results, run, shifted, table_of


def test_duplicates_equal_comparing_every_pair():
    table = table_of(*random_results(4, n_categories=2, max_gt=3, max_pred=25))
    found = find_duplicates(table, 0.6)
    expected = []
    for rows in image_slices(table.pred_image_P, table.n_images):
        iou = pairwise_iou(table.pred_boxes_P4[rows], table.pred_boxes_P4[rows])
        names = table.pred_name_P[rows]
        same = (names[:, None] == names) & (iou >= 0.6)
        expected += [(rows.start + i, rows.start + j) for i, j in zip(*np.nonzero(np.triu(same, 1)), strict=True)]
    assert len(expected) > 20
    assert sorted(zip(found.first_D, found.second_D, strict=True)) == sorted(expected)


def test_duplicates_need_the_same_name_and_the_same_image():
    preds = [pred("cat", box(0, 0)), pred("CAT", box(0, 0)), pred("dog", box(0, 0)), pred("gnu", box(0, 0))]
    results = [image(1, [], preds), image(2, [], preds[:1]), image(3, [], [])]
    evaluation = run(results)
    assert [row["dup_pairs_90"] for row in evaluation.per_image] == [1, 0, 0]
    assert (
        evaluation.metrics["set"]["dup_pairs_90"] == evaluation.metrics["set"]["dup_image_rate"] == pytest.approx(1 / 3)
    )


def test_iou_thresholds_of_duplicates():
    """A 100 x 100 box narrowed by 7 px overlaps at 0.93: a duplicate at .90 and not at .95."""
    at = (0.0, 0.0, 100.0, 100.0)
    metrics = run([image(1, [], [pred("cat", at), pred("cat", (0.0, 0.0, 93.0, 100.0))])]).metrics
    assert (metrics["set"]["dup_pairs_90"], metrics["set"]["dup_pairs_95"]) == (1, 0)


def test_nms_keeps_the_first_and_boxes_that_overlap_only_a_removed_one():
    """A chain a-b-c with a and c apart: b goes as a's duplicate, c stays because b is gone."""
    at = (0.0, 0.0, 100.0, 100.0)
    chain = [pred("cat", shifted(at, dx, 0)) for dx in (0, 4, 8)]
    table = table_of([image(1, [], chain)], ANIMALS)
    duplicates = find_duplicates(table, 0.9)
    assert len(duplicates.first_D) == 2
    assert first_of_duplicates(3, duplicates, 0.9).tolist() == [True, False, True]


def test_order_within_a_row_is_left_to_right():
    places = [box(1, 0), box(0, 0), box(2, 0), box(0, 1)]
    metrics = run([image(1, [], [pred("cat", at) for at in places]), image(2, [], [pred("cat", box(0, 0))])]).metrics
    assert metrics["set"]["order_violation_rate"] == pytest.approx(1 / 3)


def test_omission_by_number_of_objects():
    one = image(1, [("cat", box(0, 0))], [pred("cat", box(0, 0))])
    four = image(2, [("cat", box(i, 0)) for i in range(4)], [pred("cat", box(0, 0))])
    none = image(3, [], [pred("cat", box(0, 0))])
    assert run([one, four, none]).details["by_gt_count"] == [
        {"n_gt": "0", "n_images": 1, "omission_rate": None, "count_error_mean": 1.0},
        {"n_gt": "1", "n_images": 1, "omission_rate": 0.0, "count_error_mean": 0.0},
        {"n_gt": "4-6", "n_images": 1, "omission_rate": 0.75, "count_error_mean": -3.0},
    ]
