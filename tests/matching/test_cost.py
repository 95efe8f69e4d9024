"""Pair costs and the gate, against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest

from coordexp.errors import ConfigError
from coordexp.matching.cost import Pairs, gate_mask, pair_cost, paired_l1
from coordexp.matching.settings import MatchSettings

LEFT = np.array([[0.0, 0.0, 0.4, 0.4]])
OVERLAPPING = np.array([[0.2, 0.0, 0.6, 0.4]])  # intersection .08, union .24, hull .24
APART = np.array([[0.6, 0.0, 1.0, 0.4]])  # hull .40, union .32


def test_l1_is_the_mean_over_four_corner_coordinates():
    assert paired_l1(LEFT, OVERLAPPING) == pytest.approx(np.array([0.1]))
    assert paired_l1(np.zeros((1, 4)), np.ones((1, 4))) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"lambda_l1": 1.0, "lambda_iou": 0.0}, [[0.1, 0.3]]),
        ({"lambda_l1": 0.0, "lambda_iou": 1.0}, [[1 - 1 / 3, 1 + 0.08 / 0.4]]),
        ({"lambda_l1": 2.0, "lambda_iou": 3.0}, [[0.2 + 2.0, 0.6 + 3.6]]),
        ({"lambda_l1": 1.0, "lambda_iou": 0.0, "lambda_sem": 0.5}, [[0.1 + 0.5 * 0.2, 0.3 + 0.5 * 0.8]]),
    ],
)
def test_cost_by_hand(weights, expected):
    semantic = np.array([[0.2, 0.8]])
    cost = pair_cost(Pairs.of(LEFT[:, None], np.concatenate([OVERLAPPING, APART])), MatchSettings(**weights), semantic)
    assert cost == pytest.approx(np.array(expected))


def test_semantic_weight_without_distances_is_refused():
    with pytest.raises(ConfigError, match=r"matching\.lambda_sem is 0\.5"):
        pair_cost(Pairs.of(LEFT, APART), MatchSettings(lambda_sem=0.5))


@pytest.mark.parametrize(
    ("gate", "threshold", "accepted"),
    [
        ("iou", 1 / 3 - 1e-9, [True, False]),
        ("iou", 1 / 3 + 1e-9, [False, False]),
        ("iou", 0.0, [True, True]),
        ("l1", 0.2, [True, False]),
        ("l1", 0.05, [False, False]),
        ("l1", 0.5, [True, True]),
    ],
)
def test_gate(gate, threshold, accepted):
    pairs = Pairs.of(LEFT[:, None], np.concatenate([OVERLAPPING, APART]))
    mask = gate_mask(pairs, MatchSettings(gate=gate, gate_threshold=threshold))
    assert mask.tolist() == [accepted]


def test_the_threshold_itself_passes():
    half = np.array([[0.0, 0.0, 0.25, 0.5]])
    whole = np.array([[0.0, 0.0, 0.5, 0.5]])
    assert gate_mask(Pairs.of(half, whole), MatchSettings(gate="iou", gate_threshold=0.5)).all()
    assert gate_mask(Pairs.of(half, whole), MatchSettings(gate="l1", gate_threshold=0.0625)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lambda_l1": -1.0}, r"matching\.lambda_l1 is -1\.0"),
        ({"lambda_iou": float("nan")}, r"matching\.lambda_iou is nan"),
        ({"lambda_sem": "high"}, r"matching\.lambda_sem is 'high'"),
        ({"lambda_l1": True}, r"matching\.lambda_l1 is True"),
        ({"gate": "iuo"}, r"matching\.gate is 'iuo'.*Did you mean 'iou'"),
        ({"gate_threshold": 1.5}, r"matching\.gate_threshold is 1\.5"),
        ({"gate_threshold": -0.1}, r"matching\.gate_threshold is -0\.1"),
        ({"lambda_l1": 0, "lambda_iou": 0}, "all 0"),
    ],
)
def test_settings_refuse(values, message):
    with pytest.raises(ConfigError, match=message):
        MatchSettings(**values)
