"""Readout rules: against independent numpy formulas, the published two-mode example, borders, gradients."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordexp.config.schema import ReadoutRule
from coordexp.losses.coord_terms import gaussian_target
from coordexp.losses.readout import LOCAL_RADIUS_BINS, read, read_coordinates

BINS = torch.arange(1000, dtype=torch.float64)
RULES = get_args(ReadoutRule)
TOP_K = 16


def gaussian_logits(centre: float, sd: float = 2.0) -> torch.Tensor:
    return -0.5 * ((BINS - centre) / sd) ** 2


def read_bins(rule, logits_K, temperature=1.0, top_k=TOP_K) -> float:
    return read_coordinates(rule, logits_K, temperature, top_k).item() * 1000


def by_numpy(rule: str, p: np.ndarray, center: int) -> float:
    """Each rule for one distribution, written the long way."""
    k = np.arange(len(p), dtype=np.float64)
    if rule == "expectation":
        return float(np.average(k, weights=p))
    if rule == "top_k":
        best = sorted(range(len(p)), key=lambda i: (-p[i], i))[:TOP_K]
        return float(np.average(k[best], weights=p[best]))
    if rule == "local_expectation":
        radius = min(LOCAL_RADIUS_BINS, center, len(p) - 1 - center)
        window = slice(center - radius, center + radius + 1)
        return float(np.average(k[window], weights=p[window])) if p[window].sum() else float(center)
    if rule == "median":  # the CDF is linear within a bin, from its left edge to its right one
        edges = np.arange(len(p) + 1) - 0.5
        crossing = np.interp(p.sum() / 2, np.concatenate([[0], np.cumsum(p)]), edges)
        return float(np.clip(crossing, 0, len(p) - 1))
    return float(center)  # argmax, and the value of straight_through


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([0.3, 3.0, 40.0, 1e4]), emitted=st.booleans())
def test_each_rule_equals_its_formula(rule, seed, width, emitted):
    """Peaked and broad distributions anywhere on the axis, read around their peaks or around any other bin."""
    rng = np.random.default_rng(seed)
    mode = rng.choice([0, 3, 996, 999, rng.integers(1000)])
    p = rng.uniform(0.5, 1, 1000) * np.exp(-0.5 * ((np.arange(1000) - mode) / width) ** 2)
    p /= p.sum()
    center = int(rng.choice([0, 5, 999, mode])) if emitted else int(p.argmax())
    given_center = torch.tensor(center) if emitted else None
    found = read(rule, torch.from_numpy(p), BINS, TOP_K, given_center).item()
    assert found == pytest.approx(by_numpy(rule, p, center), abs=1e-9)


@pytest.mark.parametrize(
    ("rule", "bin_value"),
    [("argmax", 300), ("local_expectation", 300), ("median", 301.93), ("expectation", 316), ("straight_through", 300)],
)
def test_two_modes(rule, bin_value):
    """Modes 300 (60 %) and 340 (40 %), sd 2."""
    p = 0.6 * gaussian_logits(300).softmax(-1) + 0.4 * gaussian_logits(340).softmax(-1)
    logits_K = p.clamp(min=1e-300).log()
    assert read_bins(rule, logits_K) == pytest.approx(bin_value, abs=0.05)
    # 16 bins of both modes: still between them, as a rule that knows no distance must be.
    assert 300 < read_bins("top_k", logits_K) < 316


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_expectation_gradient_identity(temperature):
    """d c / d s_k = p_k (phi(k) - c) / temperature; that of straight_through is the same."""
    torch.manual_seed(17)
    logits_K = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    value = read_coordinates("expectation", logits_K, temperature, TOP_K)
    autograd_K = torch.autograd.grad(value, logits_K)[0]
    p_K = (logits_K.detach() / temperature).softmax(-1)
    identity_K = p_K * (BINS / 1000 - value.detach()) / temperature
    torch.testing.assert_close(autograd_K, identity_K, rtol=0, atol=1e-16)
    hard = read_coordinates("straight_through", logits_K, temperature, TOP_K)
    assert hard.item() == pytest.approx(logits_K.argmax().item() / 1000, abs=1e-12)
    assert torch.equal(torch.autograd.grad(hard, logits_K)[0], autograd_K)


@given(st.integers(min_value=0, max_value=999))
def test_local_expectation_has_no_border_bias(target_bin):
    """A target cut off at the border has its mean inward of it; the symmetric window does not."""
    q = gaussian_target(torch.tensor([float(target_bin)]), 2.0, 8, torch.float64)[0]
    logits_K = q.clamp(min=1e-300).log()
    assert read_bins("local_expectation", logits_K) == pytest.approx(target_bin, abs=1e-9)
    if target_bin in (0, 999):
        assert read_bins("expectation", logits_K) == pytest.approx(abs(target_bin - 1.302), abs=1e-3)


def test_a_window_without_mass_is_read_at_its_center():
    p_K = torch.nn.functional.one_hot(torch.tensor(700), 1000).double()
    assert read("local_expectation", p_K, BINS, center_bins=torch.tensor(100)).item() == 100


def test_top_k_limits():
    logits_K = gaussian_logits(321.4)
    assert read_bins("top_k", logits_K, top_k=1) == pytest.approx(read_bins("argmax", logits_K))
    assert read_bins("top_k", logits_K, top_k=1000) == pytest.approx(read_bins("expectation", logits_K), rel=1e-12)


def test_median_minimizes_the_expected_absolute_error():
    torch.manual_seed(3)
    logits_NK = 3 * torch.randn(5, 1000, dtype=torch.float64)
    cost_NK = (logits_NK.softmax(-1)[:, None, :] * (BINS[:, None] - BINS[None, :]).abs()).sum(-1)
    medians_N = read_coordinates("median", logits_NK, 1.0, TOP_K) * 1000
    assert torch.equal(medians_N.round().long(), cost_NK.argmin(-1))


@pytest.mark.parametrize("rule", RULES)
def test_all_rules_except_argmax_have_a_gradient(rule):
    logits_K = gaussian_logits(500.3).requires_grad_()
    coordinate = read_coordinates(rule, logits_K, 1.0, TOP_K)
    if rule == "argmax":
        assert not coordinate.requires_grad
    else:
        coordinate.backward()
        assert logits_K.grad.isfinite().all()
        assert logits_K.grad.abs().max() > 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_shapes_ranges_and_extreme_logits(rule):
    logits_B4K = torch.full((3, 4, 1000), -1e4).bfloat16()
    logits_B4K[0, :, 0], logits_B4K[1, :, 999] = 1e4, 1e4
    coords_B4 = read_coordinates(rule, logits_B4K, 0.7, TOP_K)
    assert coords_B4.shape == (3, 4)
    assert coords_B4.dtype == torch.float32
    assert coords_B4[0].tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert coords_B4[1].tolist() == pytest.approx([0.999] * 4)
    assert ((coords_B4 >= 0) & (coords_B4 <= 0.999)).all()
    assert read_coordinates(rule, torch.zeros(0, 1000), 1.0, TOP_K).shape == (0,)


@pytest.mark.parametrize("rule", RULES)
def test_an_embedding_is_read_by_the_same_rules_as_a_coordinate(rule):
    """Rows that hold their bin's number, and one that does not depend on it."""
    table_KD = torch.stack([BINS, torch.ones(1000, dtype=torch.float64)], dim=1)
    p_NK = (3 * torch.randn(6, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).softmax(-1)
    embeddings_ND = read(rule, p_NK, table_KD, TOP_K)
    expected_ND = torch.stack([read(rule, p_NK, BINS, TOP_K), torch.ones(6, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(embeddings_ND, expected_ND, rtol=0, atol=1e-9)
