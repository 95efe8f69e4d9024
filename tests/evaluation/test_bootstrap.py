from __future__ import annotations

import numpy as np
import pytest

from coordexp.evaluation.average_precision import match_categories
from coordexp.evaluation.bootstrap import interval, resample_weights, resampled_ap, resampled_f1
from coordexp.evaluation.f1 import match_greedily
from coordexp.matching.summary import f1_from_counts
from evaluation.builders import random_results, table_of


def test_a_resample_draws_as_many_images_as_there_are():
    weights_BI = resample_weights(37, 200, seed=17)
    assert weights_BI.shape == (200, 37)
    assert (weights_BI.sum(axis=1) == 37).all()
    assert (weights_BI == 0).mean() == pytest.approx((1 - 1 / 37) ** 37, abs=0.02), (
        "an image is left out with this chance"
    )


def test_the_seed_determines_the_resamples():
    first, same, other = (resample_weights(20, 5, s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_f1_samples_equal_counting_the_drawn_images():
    table = table_of(*random_results(3))
    matches = match_greedily(table, 0.3)
    weights_BI = resample_weights(table.n_images, 20, 17)
    samples = resampled_f1(matches, weights_BI)
    for b, weights in enumerate(weights_BI):
        drawn = np.repeat(np.arange(table.n_images), weights)
        for mode in ("loc", "full"):
            assert samples[f"f1.{mode}_50"][b] == pytest.approx(
                f1_from_counts(matches.counts(0.5, mode)[drawn].sum(axis=0))
            )


def test_ap_of_a_set_that_vanishes_from_a_resample_is_undefined_there():
    results, categories = random_results(5, n_images=3, max_gt=2)
    table = table_of(results, categories)
    only_first = np.array([[3, 0, 0], [1, 1, 1]])
    samples = resampled_ap(match_categories(table), only_first, {f"{k}": [k] for k in range(len(categories))})
    for k in range(len(categories)):
        in_first = ((table.gt_category_G == k) & (table.gt_image_G == 0)).any()
        assert np.isnan(samples[f"{k}.mAP"][0]) == (not in_first)


def test_interval_of_a_known_distribution_lies_around_the_point_value():
    """Samples that sit 0.3 too high are moved back: their spread is what the interval takes from them."""
    samples = 0.8 + np.random.default_rng(0).normal(0, 0.1, 100_000)
    low, high = interval(samples, 0.5)
    assert low == pytest.approx(0.5 - 0.196, abs=0.005)
    assert high == pytest.approx(0.5 + 0.196, abs=0.005)
    assert interval(np.append(samples, np.nan), 0.5) == pytest.approx([low, high], abs=1e-6)
    assert interval(np.full(3, np.nan), 0.5) is None
    assert interval(samples, None) is None
