"""The AP that each score would reach: predicted by construction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordexp.evaluation.scores import CONSTANT, IN_USE, PERFECT
from coordexp.records.gt_vs_pred import ImageResult
from evaluation.builders import CAT, box, image, pred, random_results, run


def scored(right: float, wrong: float) -> list[ImageResult]:
    """Eight objects, each found, and as many inventions; coordinates rank them well, names rank them backwards."""
    hit = replace(pred("cat", box(0, 0), right), coord_logprobs=(-0.1,) * 4, desc_logprob=-2.0, scores={"mix": right})
    miss = replace(pred("cat", box(3, 3), wrong), coord_logprobs=(-2.0,) * 4, desc_logprob=-0.1, scores={"mix": wrong})
    return [image(i, [("cat", box(0, 0))], [hit, miss]) for i in range(8)]


def test_every_score_of_the_file_is_ranked():
    """N inventions ranked first cap the precision of all N hits at 1/2; ranked last they cost nothing."""
    rows = {row["score"]: row for row in run(scored(0.4, 0.6), [CAT]).details["scores"]}
    assert list(rows) == [IN_USE, "mix", "coord_logprob", "desc_logprob", CONSTANT, PERFECT]
    reached = {name: row["mAP"] for name, row in rows.items()}
    assert reached[IN_USE] == reached["mix"] == reached["desc_logprob"] == pytest.approx(0.5)
    assert reached["coord_logprob"] == reached[PERFECT] == pytest.approx(1)
    assert 0.5 < reached[CONSTANT] < 1
    assert [rows[name]["auroc_tp_fp"] for name in ("coord_logprob", "desc_logprob", CONSTANT)] == [1, 0, None]


def test_headroom_is_what_the_ranking_loses():
    confidence = run(scored(0.4, 0.6), [CAT]).metrics["confidence"]
    assert confidence["headroom_mAP"] == pytest.approx(0.5)
    assert run(scored(0.6, 0.4), [CAT]).metrics["confidence"]["headroom_mAP"] == pytest.approx(0)


@pytest.mark.parametrize("seed", range(4))
def test_no_score_beats_the_perfect_ranking(seed: int):
    evaluation = run(*random_results(seed))
    rows = {row["score"]: row["mAP"] for row in evaluation.details["scores"]}
    assert max(rows.values()) == rows[PERFECT] == evaluation.metrics["confidence"]["perfect_ranking_mAP"]
    assert rows[IN_USE] == pytest.approx(evaluation.metrics["coco"]["mAP"])


def test_a_score_that_some_predictions_lack_is_no_candidate():
    results = scored(0.4, 0.6)
    first = results[0]
    results[0] = replace(first, pred=(replace(first.pred[0], coord_logprobs=None, scores={}), first.pred[1]))
    assert [row["score"] for row in run(results, [CAT]).details["scores"]] == [
        IN_USE,
        "desc_logprob",
        CONSTANT,
        PERFECT,
    ]
