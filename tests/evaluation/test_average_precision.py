from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordexp.evaluation.average_precision import match_categories, mean_ap, unweighted_ap, weighted_ap
from coordexp.evaluation.coco import coco_ap
from evaluation.builders import random_results, table_of
from evaluation.test_coco import CASES


@pytest.mark.parametrize("case", CASES)
def test_weights_of_one_give_the_number_of_record(case):
    table = table_of(*CASES[case])
    np.testing.assert_allclose(
        unweighted_ap(match_categories(table), table.n_images), coco_ap(table).ap_KT(), atol=1e-12
    )


@pytest.mark.parametrize("seed", range(6))
def test_weights_are_copies_of_images(seed):
    """Weight w equals w copies of the image, also with crowds and ties between images; weight 0 its absence."""
    results, categories = random_results(seed, n_images=12, crowd_rate=0.1 * (seed % 3))
    if seed % 2:
        results = [replace(r, pred=tuple(replace(p, score=1 / k) for k, p in enumerate(r.pred, 1))) for r in results]
    weights = np.random.default_rng(seed).multinomial(len(results), np.full(len(results), 1 / len(results)))
    copies = [
        replace(result, image_id=100 * result.image_id + copy)
        for result, weight in zip(results, weights, strict=True)
        for copy in range(weight)
    ]
    table = table_of(results, categories)
    weighted = weighted_ap(match_categories(table), weights[None])[..., 0]
    np.testing.assert_allclose(weighted, coco_ap(table_of(copies, categories)).ap_KT(), atol=1e-12)


def test_many_weightings_at_once_equal_one_at_a_time(monkeypatch):
    table = table_of(*random_results(9, n_images=15))
    matches = match_categories(table)
    weights_BI = np.random.default_rng(0).integers(0, 4, (7, table.n_images))
    single = [weighted_ap(matches, weights[None])[..., 0] for weights in weights_BI]
    monkeypatch.setattr("coordexp.evaluation.average_precision._CELLS_PER_BLOCK", 60)
    np.testing.assert_array_equal(weighted_ap(matches, weights_BI), np.stack(single, axis=-1))


def test_a_category_without_objects_is_undefined_rather_than_zero():
    table = table_of(*random_results(0))
    ap_KT = unweighted_ap(match_categories(table), table.n_images)
    assert np.isnan(ap_KT[-1]).all()
    assert mean_ap(ap_KT) == pytest.approx(ap_KT[:-1].mean())
    assert mean_ap(ap_KT[-1:]) is None
