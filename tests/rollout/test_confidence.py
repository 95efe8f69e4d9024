"""Scores: expected IoU against brute force, hand-computed values, and invariances of each scheme."""

from __future__ import annotations

import numpy as np
import pytest

from coordexp.config.schema import DecodeParams
from coordexp.geometry.bins import NUM_BINS
from coordexp.geometry.boxes import pairwise_iou
from coordexp.rollout.confidence import (
    DISTRIBUTIONAL,
    SCORES,
    Evidence,
    expected_iou,
    score_objects,
    slot_sd,
    spread,
    stratum_means,
)

BOXES = np.array([[100.0, 200.0, 300.0, 500.0], [400.0, 410.0, 430.0, 450.0]])


def peaked(boxes_N4: np.ndarray, sd: float) -> np.ndarray:
    """Gaussian distributions around the boxes' coordinates, (N, 4, K)."""
    k = np.arange(NUM_BINS)
    weights = np.exp(-0.5 * ((k - boxes_N4[..., None]) / sd) ** 2)
    return weights / weights.sum(axis=-1, keepdims=True)


def sampled_iou(box_4: np.ndarray, probs_4K: np.ndarray, n: int) -> float:
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.choice(NUM_BINS, n, p=p / p.sum()) for p in probs_4K], axis=1).astype(float)
    valid = (drawn[:, 2] > drawn[:, 0]) & (drawn[:, 3] > drawn[:, 1])
    return float((pairwise_iou(box_4[None], drawn)[0] * valid).mean())


@pytest.mark.parametrize("sd", [0.5, 3.0, 12.0, 60.0])
def test_expected_iou_equals_brute_force(sd: float) -> None:
    probs = peaked(BOXES, sd)
    found = expected_iou(BOXES, probs)
    brute = [sampled_iou(box, p, 100_000) for box, p in zip(BOXES, probs, strict=True)]
    np.testing.assert_allclose(found, brute, atol=0.02)


def test_expected_iou_of_two_modes_by_hand() -> None:
    """x2 at 200 or 300 with equal mass, the rest certain: the mean of two IoUs, exactly."""
    probs = np.zeros((1, 4, NUM_BINS))
    for c, k in enumerate((100, 200, 300, 500)):
        probs[0, c, k] = 1.0
    probs[0, 2, [200, 300]] = 0.5
    assert expected_iou(BOXES[:1], probs)[0] == pytest.approx((1.0 + 0.5) / 2)


def test_expected_iou_converges_and_counts_inverted_boxes_as_zero() -> None:
    broad = np.full((1, 4, NUM_BINS), 1 / NUM_BINS)
    coarse, fine = (expected_iou(BOXES[:1], broad, nodes=q)[0] for q in (8, 16))
    assert coarse == pytest.approx(fine, abs=0.01)
    assert fine == pytest.approx(sampled_iou(BOXES[0], broad[0], 200_000), abs=0.01)


def test_stratum_means_keep_the_mean() -> None:
    probs = np.random.default_rng(1).dirichlet(np.full(NUM_BINS, 0.05), size=(3, 4))
    k = np.arange(NUM_BINS)
    nodes = stratum_means(probs, 8)
    np.testing.assert_allclose(nodes.mean(axis=-1), probs @ k)
    assert (np.diff(nodes, axis=-1) >= -1e-9).all()


def test_slot_sd_by_hand() -> None:
    probs = np.zeros((1, 4, NUM_BINS))
    probs[..., 100] = probs[..., 104] = 0.5
    np.testing.assert_allclose(slot_sd(probs), 2.0)


def test_the_same_spread_costs_a_small_box_more() -> None:
    large, small = spread(BOXES, peaked(BOXES, 4.0))
    assert small < large
    large, small = expected_iou(BOXES, peaked(BOXES, 4.0))
    assert small < large


def test_probability_scores_by_hand() -> None:
    evidence = Evidence(np.log([[0.5, 0.5, 0.5, 0.5]]), np.log([0.25]), BOXES[:1], peaked(BOXES[:1], 1e-3))
    scores = {name: float(values[0]) for name, values in score_objects(evidence).items()}
    assert scores == pytest.approx(
        {
            "constant": 1.0,
            "coord_logprob": 0.5,
            "desc_logprob": 0.25,
            "mix": 0.7 * 0.5 + 0.3 * 0.25,
            "spread": 1.0,
            "expected_iou": 1.0,
            "quality": 0.25,
        }
    )


def test_digits_have_no_distribution_and_so_no_distributional_score() -> None:
    scores = score_objects(Evidence(np.zeros((2, 4)), np.zeros(2), BOXES, None))
    assert set(scores) == set(SCORES) - DISTRIBUTIONAL


def test_no_objects() -> None:
    empty = Evidence(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 4)), np.zeros((0, 4, NUM_BINS)))
    assert {name: values.shape for name, values in score_objects(empty).items()} == dict.fromkeys(SCORES, (0,))


def test_the_parameter_names_every_score() -> None:
    assert set(DecodeParams.model_fields["score"].annotation.__args__) == set(SCORES)  # type: ignore[union-attr]
