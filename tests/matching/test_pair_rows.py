"""The rows of all pairs, compared with nested loops."""

from __future__ import annotations

import numpy as np
import pytest

from coordexp.matching.pair_rows import PairRows, place_within, starts


@pytest.mark.parametrize("sizes", [[(2, 3)], [(0, 2), (1, 2), (3, 1), (2, 0), (2, 2)], [(0, 0)], []])
def test_rows_are_those_of_nested_loops(sizes):
    rows = PairRows.of([n for n, _ in sizes], [m for _, m in sizes])
    expected, lateness, pred_start, gt_start = [], [], 0, 0
    for n_pred, n_gt in sizes:
        expected += [(pred_start + i, gt_start + j) for i in range(n_pred) for j in range(n_gt)]
        lateness += [1 - (n_pred - i) / n_pred * ((n_gt - j) / n_gt) for i in range(n_pred) for j in range(n_gt)]
        pred_start, gt_start = pred_start + n_pred, gt_start + n_gt
    assert list(zip(rows.pred_R.tolist(), rows.gt_R.tolist(), strict=True)) == expected
    assert rows.n_rows_I.tolist() == [n * m for n, m in sizes]
    np.testing.assert_allclose(rows.lateness_R(), lateness)


def test_pieces_by_hand():
    counts = np.array([2, 0, 3])
    assert starts(counts).tolist() == [0, 2, 2, 5]
    assert place_within(counts).tolist() == [0, 1, 0, 1, 2]
