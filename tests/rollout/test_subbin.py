"""Sub-bin rules: exact on peaks, right on hand-made distributions, never a box turned over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.config.schema import DecodeParams
from coordexp.geometry.bins import NUM_BINS
from coordexp.rollout.subbin import BOX_RULES, LOCAL_RADIUS_BINS, decode_bins

EMITTED = np.array([[100, 200, 300, 400]])


def slots(*masses: dict[int, float]) -> np.ndarray:
    """Distributions at the four slots of one box, (1, 4, K); the last one repeats."""
    probs = np.zeros((1, 4, NUM_BINS))
    for c in range(4):
        for k, p in masses[min(c, len(masses) - 1)].items():
            probs[0, c, k] = p
    return probs


@pytest.mark.parametrize("rule", BOX_RULES)
def test_all_mass_on_the_emitted_bins_is_those_bins(rule: str) -> None:
    probs = slots({100: 1.0}, {200: 1.0}, {300: 1.0}, {400: 1.0})
    np.testing.assert_allclose(decode_bins(rule, EMITTED, probs), EMITTED)


def test_two_neighbours_by_hand() -> None:
    probs = slots({100: 0.75, 101: 0.25}, {200: 1.0}, {300: 1.0}, {400: 1.0})
    x1 = {rule: decode_bins(rule, EMITTED, probs)[0, 0] for rule in BOX_RULES}
    assert x1["argmax"] == 100
    assert x1["expectation"] == x1["local_expectation"] == pytest.approx(100.25)
    assert x1["median"] == pytest.approx(100 - 0.5 + 0.5 / 0.75)  # half the mass lies two thirds into bin 100


def test_a_far_second_mode_moves_only_the_expectation() -> None:
    probs = slots({100: 0.6, 700: 0.4}, {200: 1.0}, {800: 1.0}, {400: 1.0})
    emitted = np.array([[100, 200, 800, 400]])
    assert decode_bins("expectation", emitted, probs)[0, 0] == pytest.approx(340)
    assert decode_bins("local_expectation", emitted, probs)[0, 0] == pytest.approx(100)
    assert abs(decode_bins("median", emitted, probs)[0, 0] - 100) < 1


def test_the_window_stops_at_its_radius_and_at_the_edges() -> None:
    at_radius = slots({0: 0.5, LOCAL_RADIUS_BINS: 0.5}, {0: 0.5, LOCAL_RADIUS_BINS + 1: 0.5}, {999: 1.0}, {999: 1.0})
    decoded = decode_bins("local_expectation", np.array([[0, 0, 999, 999]]), at_radius)
    np.testing.assert_allclose(decoded, [[LOCAL_RADIUS_BINS / 2, 0, 999, 999]])


def test_a_box_that_would_turn_over_keeps_its_emitted_axis() -> None:
    probs = slots({100: 0.5, 900: 0.5}, {200: 0.5, 202: 0.5}, {300: 0.9, 0: 0.1}, {400: 1.0})
    decoded = decode_bins("expectation", EMITTED, probs)
    np.testing.assert_allclose(decoded, [[100, 201, 300, 400]])


def test_no_objects_and_digits_beyond_the_last_bin() -> None:
    for rule in BOX_RULES:
        assert decode_bins(rule, np.zeros((0, 4)), np.zeros((0, 4, NUM_BINS))).shape == (0, 4)


@given(st.integers(0, 2**32 - 1))
def test_any_distribution_gives_an_ordered_box_inside_the_axis(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(NUM_BINS, 0.02), size=(3, 4))
    low, span = rng.integers(0, 900, (3, 2)), rng.integers(1, 100, (3, 2))
    emitted = np.concatenate([low, low + span], axis=1)
    for rule in BOX_RULES:
        decoded = decode_bins(rule, emitted, probs)
        assert (decoded[:, 2:] > decoded[:, :2]).all()
        assert ((decoded >= 0) & (decoded <= NUM_BINS - 1)).all()


def test_the_parameter_names_every_rule() -> None:
    assert set(DecodeParams.model_fields["box"].annotation.__args__) == set(BOX_RULES)  # type: ignore[union-attr]
