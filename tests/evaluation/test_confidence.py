from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from coordexp.evaluation.average_precision import mean_ap, unweighted_ap
from coordexp.evaluation.coco_matching import match_categories
from coordexp.evaluation.confidence import auroc, calibration_error, oracle_scores
from evaluation.builders import random_results, table_of


def test_auroc_is_the_mann_whitney_statistic():
    rng = np.random.default_rng(0)
    score, right = rng.integers(0, 6, 200) / 5, rng.random(200) < 0.4
    statistic = mannwhitneyu(score[right], score[~right]).statistic
    assert auroc(score, right) == pytest.approx(statistic / (right.sum() * (~right).sum()))


def test_bins_hold_equal_mass_and_the_error_weighs_them():
    """Two bins of 5: confidence 0.2 with 1 of 5 right is calibrated, 0.8 with 1 of 5 right is off by 0.6."""
    confidence = np.repeat([0.2, 0.8], 5)
    right = np.tile([True, False, False, False, False], 2)
    error, bins = calibration_error(confidence, right, 2)
    assert [(row["n"], row["precision"]) for row in bins] == [(5, 0.2), (5, 0.2)]
    assert error == pytest.approx(0.3)


def test_equal_confidences_are_never_split():
    """Split by file order, nine equal and wrong then one right would fall into bins of different precision."""
    error, bins = calibration_error(np.full(10, 0.1), np.arange(10) == 9, 10)
    assert len(bins) == 1
    assert error == pytest.approx(0)


def test_calibrated_confidence_has_a_small_error_and_overconfidence_a_large_one():
    rng = np.random.default_rng(1)
    confidence = rng.random(20_000)
    assert calibration_error(confidence, rng.random(20_000) < confidence, 10)[0] < 0.02
    assert calibration_error(confidence, rng.random(20_000) < confidence**2, 10)[0] == pytest.approx(1 / 6, abs=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_no_ranking_beats_the_perfect_one(seed):
    table = table_of(*random_results(seed, crowd_rate=0.1))
    rng = np.random.default_rng(seed)

    def m_ap(scores):
        return mean_ap(unweighted_ap(match_categories(table.with_scores(scores)), table.n_images))

    best = m_ap(oracle_scores(table))
    assert best > m_ap(table.pred_score_P)
    assert all(best >= m_ap(rng.random(len(table.pred_score_P))) for _ in range(10))
