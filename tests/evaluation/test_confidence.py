from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from coordexp.evaluation.average_precision import match_categories, mean_ap, ranking_flags, unweighted_ap
from coordexp.evaluation.confidence import (
    CONSTANT,
    IN_USE,
    PERFECT,
    auroc,
    best_threshold,
    calibration_error,
    oracle_scores,
    threshold_curve,
)
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult
from evaluation.builders import CAT, DOG, box, image, pred, random_results, run, shifted, table_of


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


def scored(right: float, wrong: float) -> list[ImageResult]:
    """Eight objects, each found, and as many inventions; coordinates rank them well, names rank them backwards."""
    hit = replace(pred("cat", box(0, 0), right), coord_logprobs=(-0.1,) * 4, desc_logprob=-2.0, scores={"mix": right})
    miss = replace(pred("cat", box(3, 3), wrong), coord_logprobs=(-2.0,) * 4, desc_logprob=-0.1, scores={"mix": wrong})
    return [image(i, [("cat", box(0, 0))], [hit, miss]) for i in range(8)]


def test_every_score_of_the_file_is_ranked():
    """N inventions ranked first cap the precision of all N hits at 1/2; ranked last they cost nothing."""
    evaluation = run(scored(0.4, 0.6), [CAT])
    rows = {row["score"]: row for row in evaluation.details["scores"]}
    assert list(rows) == [IN_USE, "mix", "coord_logprob", "desc_logprob", CONSTANT, PERFECT]
    reached = {name: row["mAP"] for name, row in rows.items()}
    assert reached[IN_USE] == reached["mix"] == reached["desc_logprob"] == pytest.approx(0.5)
    assert reached["coord_logprob"] == reached[PERFECT] == pytest.approx(1)
    assert 0.5 < reached[CONSTANT] < 1
    confidence = evaluation.metrics["confidence"]
    assert confidence["headroom_mAP"] == pytest.approx(reached[PERFECT] - reached[IN_USE])
    assert confidence["perfect_ranking_mAP"] == reached[PERFECT]
    assert run(scored(0.6, 0.4), [CAT]).metrics["confidence"]["headroom_mAP"] == pytest.approx(0)
    assert [rows[name]["auroc_tp_fp"] for name in ("coord_logprob", "desc_logprob", CONSTANT)] == [1, 0, None]


def test_a_score_that_some_predictions_lack_is_not_a_candidate():
    results = scored(0.4, 0.6)
    first = results[0]
    results[0] = replace(first, pred=(replace(first.pred[0], coord_logprobs=None, scores={}), first.pred[1]))
    assert [row["score"] for row in run(results, [CAT]).details["scores"]] == [
        IN_USE,
        "desc_logprob",
        CONSTANT,
        PERFECT,
    ]


IOU_5_PX = 35**2 / (2 * 40**2 - 35**2)


def lrp(results, categories=(CAT,)) -> tuple:
    confidence = run(results, categories).metrics["confidence"]
    return tuple(confidence[key] for key in ("lrp", "lrp_loc", "lrp_fp", "lrp_fn"))


def test_boxes_shifted_by_5_px_cost_localization_only():
    results = [image(i, [("cat", box(0, 0))], [pred("cat", shifted(box(0, 0), 5, 5))]) for i in range(4)]
    assert lrp(results) == pytest.approx(((1 - IOU_5_PX) / 0.5, 1 - IOU_5_PX, 0, 0))


def test_a_threshold_between_correct_and_incorrect_scores_has_zero_error():
    right, wrong = pred("cat", box(0, 0), 0.9), pred("cat", box(3, 3), 0.2)
    assert lrp([image(1, [("cat", box(0, 0))], [right, wrong])]) == pytest.approx((0, 0, 0, 0))


def test_a_threshold_cannot_separate_equal_scores():
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


@pytest.mark.parametrize("seed", range(3))
def test_each_threshold_counts_what_is_left_above_it(seed):
    """The curve from one matching is that of judging the predictions above each threshold alone."""
    table = table_of(*random_results(seed, crowd_rate=0.1))
    curve = threshold_curve(table, match_categories(table))
    assert [row["threshold"] for row in curve] == sorted({row["threshold"] for row in curve})
    for row in curve[:: max(1, len(curve) // 7)]:
        above = table.keep_predictions(table.pred_score_P >= row["threshold"])
        right_P, judged_P = ranking_flags(above, match_categories(above))
        tp, n_pred, n_gt = right_P.sum(), judged_P.sum(), table.n_gt_I.sum()
        assert row["precision"] == pytest.approx(tp / n_pred)
        assert row["recall"] == pytest.approx(tp / n_gt)
        assert row["f1"] == pytest.approx(2 * tp / (n_pred + n_gt))
    best = best_threshold(curve)
    assert best["best_f1_50"] == max(row["f1"] for row in curve)
    assert best_threshold([]) == {"best_f1_50": None, "best_threshold_50": None}
