"""Target distributions: entropy floors, edge bias, sub-bin means (the published tables, all rows)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordexp.losses.coord_terms import (
    gaussian_target,
    rounded_bins,
    soft_target,
    target_entropy,
    triangular_target,
    two_bin_target,
)

BINS = torch.arange(1000, dtype=torch.float64)
KINDS = ("gaussian", "triangular", "two_bin")


def gaussian_at(target_bin: float, sigma: float, truncate: int) -> torch.Tensor:
    return gaussian_target(torch.tensor([target_bin]), sigma, truncate, torch.float64)[0]


@pytest.mark.parametrize(
    ("sigma", "truncate", "floor", "peak", "w1_bins", "edge_bias", "edge_floor"),
    [
        (2, 16, 2.112, 0.1995, 1.562, 1.30, 1.518),
        (2, 8, 2.112, 0.1995, 1.562, 1.30, 1.518),
        (1.5, 8, 1.824, 0.266, 1.151, 0.91, 1.262),
        (1, 8, 1.419, 0.399, 0.728, 0.52, 0.919),
        (1, 4, 1.419, 0.399, 0.728, 0.52, 0.919),
        (0.5, 4, 0.670, 0.787, 0.214, 0.12, 0.368),
    ],
)
def test_gaussian_entropy_lower_bounds(sigma, truncate, floor, peak, w1_bins, edge_bias, edge_floor):
    inner, edge = gaussian_at(500, sigma, truncate), gaussian_at(0, sigma, truncate)
    assert target_entropy(inner[None]).item() == pytest.approx(floor, abs=6e-4)
    assert inner.max().item() == pytest.approx(peak, abs=6e-4)
    assert (inner * (BINS - 500).abs()).sum().item() == pytest.approx(w1_bins, abs=1.1e-3)
    assert (edge * BINS).sum().item() == pytest.approx(edge_bias, abs=6e-3)
    assert target_entropy(edge[None]).item() == pytest.approx(edge_floor, abs=6e-4)


@pytest.mark.parametrize(
    ("sigma", "biases"),
    [
        (2, (1.302, 0.780, 0.405, 0.176, 0.061, 0.004)),
        (1.5, (0.910, 0.429, 0.151, 0.036, 0.006, 0.000)),
        (1, (0.520, 0.129, 0.014, 0.001, 0.000, 0.000)),
    ],
)
def test_edge_bias_and_its_mirror(sigma, biases):
    for target_bin, bias in zip((0, 1, 2, 3, 4, 6), biases, strict=True):
        low = (gaussian_at(target_bin, sigma, 8) * BINS).sum().item() - target_bin
        high = (gaussian_at(999 - target_bin, sigma, 8) * BINS).sum().item() - (999 - target_bin)
        assert low == pytest.approx(bias, abs=6e-4)
        assert high == pytest.approx(-low, abs=1e-9)


@pytest.mark.parametrize(("sigma", "peak", "floor"), [(1, 0.6995, 0.985), (1.5, 0.633, 1.280), (2, 0.600, 1.479)])
def test_mixing_hard_and_soft_is_a_spiked_target(sigma, peak, floor):
    soft = gaussian_at(500, sigma, 8)
    spiked = ((BINS == 500).double() + soft) / 2
    assert spiked.max().item() == pytest.approx(peak, abs=6e-4)
    assert target_entropy(spiked[None]).item() == pytest.approx(floor, abs=6e-4)
    soft_w1, spiked_w1 = ((q * (BINS - 500).abs()).sum().item() for q in (soft, spiked))
    assert spiked_w1 == pytest.approx(soft_w1 / 2, rel=1e-12)


def test_triangular_by_hand():
    q = triangular_target(torch.tensor([5.0, 0.0]), truncate=2, dtype=torch.float64)
    assert q[0, 2:9].tolist() == pytest.approx([0, 1 / 9, 2 / 9, 3 / 9, 2 / 9, 1 / 9, 0])
    assert q[1, :4].tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])


@pytest.mark.parametrize("build", [lambda y: gaussian_target(y, 2.0, 0), lambda y: triangular_target(y, 0)])
def test_truncate_zero_is_one_hot(build):
    y_N = torch.tensor([0.0, 17.4, 999.0])
    assert torch.equal(build(y_N), (rounded_bins(y_N)[:, None] == BINS).float())


def test_windowed_gaussian_equals_the_formula_over_all_bins():
    t_N = torch.arange(1000, dtype=torch.float64)
    for truncate in (3, 8, 600):
        distance_NK = (BINS - t_N[:, None]).abs()
        formula_NK = torch.exp(-0.5 * (distance_NK / 1.5) ** 2) * (distance_NK <= truncate)
        formula_NK /= formula_NK.sum(-1, keepdim=True)
        q_NK = gaussian_target(t_N, 1.5, truncate, torch.float64)
        torch.testing.assert_close(q_NK, formula_NK, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("y", "bins", "masses"), [(10.0, (10, 11), (1.0, 0.0)), (10.3, (10, 11), (0.7, 0.3))])
def test_two_bin_by_hand(y, bins, masses):
    q = two_bin_target(torch.tensor([y], dtype=torch.float64), torch.float64)[0]
    assert q[list(bins)].tolist() == pytest.approx(masses)


def test_two_bin_at_the_last_bin_never_indexes_past_it():
    q = two_bin_target(torch.tensor([999.0, 1000.0]))
    assert q[:, 998:].tolist() == [[0.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize(("fraction", "floor"), [(0.0, 0.0), (0.3, 0.611), (0.5, math.log(2))])
def test_two_bin_lower_bound_is_the_binary_entropy(fraction, floor):
    q = two_bin_target(torch.tensor([123 + fraction], dtype=torch.float64), torch.float64)
    assert target_entropy(q).item() == pytest.approx(floor, abs=6e-4)


@given(st.floats(min_value=0, max_value=999))
def test_two_bin_mean_is_the_unrounded_target(y):
    q = two_bin_target(torch.tensor([y], dtype=torch.float64), torch.float64)[0]
    assert (q * BINS).sum().item() == pytest.approx(y, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(y=st.floats(min_value=-3, max_value=1003))
def test_every_family_is_a_distribution_near_its_target(kind, y):
    q = soft_target(torch.tensor([y], dtype=torch.float64), kind, 2.0, 8, torch.float64)[0]
    inside = min(max(y, 0.0), 999.0)
    assert q.min() >= 0
    assert q.sum().item() == pytest.approx(1, abs=1e-12)
    assert ((q > 0) & ((BINS - inside).abs() > 8.5)).sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_slots(kind):
    assert soft_target(torch.zeros(0), kind, 2.0, 8).shape == (0, 1000)


def test_rounding_clamps_to_the_bins():
    y_N = torch.tensor([-0.2, 0.49, 0.51, 998.6, 1000.0])
    assert rounded_bins(y_N).tolist() == [0, 0, 1, 999, 999]
