from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.evaluation.f1 import (
    f1_metrics,
    greedy_pairs,
    image_f1,
    match_greedily,
    named_in_image,
    precision_recall,
)
from coordexp.evaluation.protocol import STANDARD
from coordexp.matching.summary import f1_from_counts
from evaluation.builders import random_results, table_of


def test_pairs_are_taken_in_falling_iou_with_ties_by_prediction_then_object():
    iou = np.array([[0.6, 0.9, 0.6], [0.6, 0.9, 0.7], [0.6, 0.2, 0.7]])
    rows, columns = greedy_pairs(iou, 0.5)
    assert list(zip(rows, columns, strict=True)) == [(0, 1), (1, 2), (2, 0)]
    assert [len(part) for part in greedy_pairs(np.empty((0, 3)), 0.5)] == [0, 0]


@given(st.integers(0, 10_000), st.floats(0.31, 0.95))
def test_pairs_at_a_higher_threshold_are_a_prefix(seed, threshold):
    """What lets one matching serve all thresholds; coarse values make ties."""
    rng = np.random.default_rng(seed)
    iou = rng.integers(0, 12, rng.integers(0, 7, 2)) / 11
    rows, columns = greedy_pairs(iou, 0.3)
    kept = iou[rows, columns] >= threshold
    np.testing.assert_array_equal(np.stack(greedy_pairs(iou, threshold)), np.stack([rows[kept], columns[kept]]))


@given(st.tuples(*[st.integers(0, 30)] * 3))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(counts):
    precision, recall = precision_recall(np.array(counts))
    f1 = float(f1_from_counts(np.array(counts)))
    if recall is None:
        assert np.isnan(f1), "no object is counted"
    elif not precision or not recall:
        assert f1 == 0, "objects, and none is found"
    else:
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall))


def test_an_image_without_objects_scores_one_without_predictions():
    counts_I3 = np.array([[0, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 0]])
    np.testing.assert_allclose(image_f1(counts_I3), [1, 0, 0, 2 / 3])


@pytest.mark.parametrize("crowd_rate", [0.0, 0.4])
def test_counts_add_up(crowd_rate):
    table = table_of(*random_results(2, crowd_rate=crowd_rate))
    matches = match_greedily(table, 0.3)
    for iou in (0.3, 0.5, 0.9):
        full, loc = matches.counts(iou, "full"), matches.counts(iou, "loc")
        np.testing.assert_array_equal(loc[:, 0] + loc[:, 2], table.n_gt_I)
        np.testing.assert_array_equal(full[:, :2].sum(axis=1), loc[:, :2].sum(axis=1))
        assert (full[:, 0] <= loc[:, 0]).all()
        judged = loc[:, :2].sum(axis=1)
        assert (judged <= table.n_pred_I).all()
        if crowd_rate == 0:
            np.testing.assert_array_equal(judged, table.n_pred_I)


def test_thresholds_name_the_keys_and_the_published_ones_are_always_there():
    table = table_of(*random_results(1))
    matches = match_greedily(table, 0.35)
    keys = set(f1_metrics(table, matches, matches, STANDARD.model_copy(update={"f1_ious": (0.35, 0.9)})))
    assert {"loc_35", "full_35_macro", "loc_50", "full_50_annotated", "loc_90", "full_90", "full_95"} <= keys
    assert "loc_75" not in keys


def test_named_in_image_is_evaluated_per_image():
    table = table_of(*random_results(6))
    present = {(int(i), int(c)) for i, c in zip(table.gt_image_G, table.gt_category_G, strict=True)}
    expected = [(int(i), int(c)) in present for i, c in zip(table.pred_image_P, table.pred_category_P, strict=True)]
    np.testing.assert_array_equal(named_in_image(table), expected)
    assert 0 < sum(expected) < len(expected)
