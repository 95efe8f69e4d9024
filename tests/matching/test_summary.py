"""From counts to ratios: a published run, empty images, and additivity of counts."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from coordexp.matching.matcher import match
from coordexp.matching.summary import MatchCounts, ratio_text, wilson
from helpers import PARAMS

# Step, F1, precision, recall, predictions, matched, false positives, false negatives of a published evaluation.
PUBLISHED = [
    (300, 0.6209, 0.5973, 0.6464, 3958, 2364, 1594, 1293),
    (600, 0.6306, 0.6172, 0.6445, 3819, 2357, 1462, 1300),
    (900, 0.6316, 0.6138, 0.6505, 3876, 2379, 1497, 1278),
    (1200, 0.6432, 0.6416, 0.6448, 3675, 2358, 1317, 1299),
    (1500, 0.6460, 0.6376, 0.6546, 3755, 2394, 1361, 1263),
]


@pytest.mark.parametrize(("step", "f1", "precision", "recall", "n_pred", "matched", "fp", "fn"), PUBLISHED)
def test_published_table_from_its_own_counts(step, f1, precision, recall, n_pred, matched, fp, fn):
    counts = MatchCounts(n_pred=n_pred, n_gt=matched + fn, n_matched=matched)
    assert counts.n_false_positive == fp
    assert counts.n_false_negative == fn
    # Not 5e-5: the last precision is .63754993 from its counts, and was published as .6376.
    assert (counts.precision, counts.recall, counts.f1) == pytest.approx((precision, recall, f1), abs=6e-5)


@pytest.mark.parametrize(
    ("n_pred", "n_gt", "expected"),
    [(0, 0, (None, None, None)), (0, 4, (None, 0.0, 0.0)), (4, 0, (0.0, None, None)), (4, 4, (0.0, 0.0, 0.0))],
)
def test_nothing_matched(n_pred, n_gt, expected):
    counts = MatchCounts(n_pred=n_pred, n_gt=n_gt)
    assert (counts.precision, counts.recall, counts.f1) == expected
    assert counts.matched_iou_mean is None
    assert [ratio_text(ratio) for ratio in expected] == ["undefined" if r is None else "0.000" for r in expected]


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (3, 7), (90, 400), (0, 1)])
def test_wilson_equals_scipy(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("counts", [(50, 39, 20), (3, 9, 3), (7, 7, 7), (9, 4, 0)])
def test_intervals_contain_their_ratio_and_f1_uses_the_jaccard_index(counts):
    found = MatchCounts(*counts)
    for name, (low, high) in found.intervals.items():
        assert 0 <= low <= getattr(found, name) <= high <= 1
    n_pred, n_gt, n_matched = counts
    low, high = found.intervals["f1"]
    assert (low / (2 - low), high / (2 - high)) == pytest.approx(wilson(n_matched, n_pred + n_gt - n_matched))


def test_without_predictions_or_objects_there_is_no_interval():
    assert MatchCounts(0, 4).intervals["precision"] is None
    assert MatchCounts(4, 0).intervals | {"precision": None} == dict.fromkeys(("precision", "recall", "f1"))


def test_ratios_are_sums_over_sums():
    box, far = [0.1, 0.1, 0.5, 0.5], [0.7, 0.7, 0.9, 0.9]
    half = [0.1, 0.1, 0.5, 0.3]
    pairs = [([box], [box]), ([half, far, far], [box]), ([], [box, far])]
    images = [match(*boxes, PARAMS.matching) for boxes in pairs]
    total = sum((MatchCounts.from_result(result) for result in images), MatchCounts())
    assert total == MatchCounts(n_pred=4, n_gt=4, n_matched=2, iou_sum=pytest.approx(1.5))
    assert (total.precision, total.recall, total.f1) == (0.5, 0.5, 0.5)
    assert total.matched_iou_mean == pytest.approx(0.75)


def test_more_matches_than_objects_is_impossible():
    with pytest.raises(AssertionError):
        MatchCounts(n_pred=3, n_gt=1, n_matched=2)
