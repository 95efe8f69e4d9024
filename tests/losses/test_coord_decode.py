"""Decode rules: the published two-mode example, borders, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordexp.losses.coord_decode import (
    DECODE_RULES,
    argmax,
    expectation,
    local_expectation,
    median,
    straight_through,
    top_k_expectation,
)
from coordexp.losses.coord_terms import gaussian_target

BINS = torch.arange(1000, dtype=torch.float64)


def gaussian_logits(centre: float, sd: float = 2.0) -> torch.Tensor:
    return -0.5 * ((BINS - centre) / sd) ** 2


def two_modes() -> torch.Tensor:
    """Modes 300 (60 %) and 340 (40 %), sd 2."""
    p = 0.6 * gaussian_logits(300).softmax(-1) + 0.4 * gaussian_logits(340).softmax(-1)
    return p.clamp(min=1e-300).log()


@pytest.mark.parametrize(
    ("rule", "bin_value"),
    [("hard", 300), ("local", 300.0), ("median", 302), ("exp", 316), ("st", 300), ("top_k", None)],
)
def test_two_modes(rule, bin_value):
    decoded = DECODE_RULES[rule](two_modes()).item() * 1000
    if rule == "top_k":  # 16 bins of both modes: still between them, as a rule that knows no distance must be
        assert 300 < decoded < 316
    else:
        assert decoded == pytest.approx(bin_value, abs=0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_expectation_gradient_identity(temperature):
    """d c / d s_k = p_k (phi(k) - c) / temperature, against autograd and against finite differences."""
    torch.manual_seed(17)
    logits_K = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    value = expectation(logits_K, temperature)
    autograd_K = torch.autograd.grad(value, logits_K)[0]
    p_K = (logits_K.detach() / temperature).softmax(-1)
    identity_K = p_K * (BINS / 1000 - value.detach()) / temperature
    torch.testing.assert_close(autograd_K, identity_K, rtol=0, atol=1e-16)
    step = 1e-4
    for k in (0, 1, 499, 998, 999):
        bump_K = step * (k == BINS)
        numeric = (expectation(logits_K + bump_K, temperature) - expectation(logits_K - bump_K, temperature)) / (
            2 * step
        )
        assert numeric.item() == pytest.approx(identity_K[k].item(), rel=1e-5)


@given(st.integers(min_value=0, max_value=999))
def test_local_expectation_has_no_border_bias(target_bin):
    """A target cut off at the border has its mean inward of it; the symmetric window does not."""
    q = gaussian_target(torch.tensor([float(target_bin)]), 2.0, 8, torch.float64)[0]
    logits_K = q.clamp(min=1e-300).log()
    assert local_expectation(logits_K).item() * 1000 == pytest.approx(target_bin, abs=1e-9)


def test_expectation_is_biased_inward_at_the_borders():
    for target_bin, decoded in ((0, 1.302), (999, 999 - 1.302)):
        q = gaussian_target(torch.tensor([float(target_bin)]), 2.0, 8, torch.float64)[0]
        assert expectation(q.clamp(min=1e-300).log()).item() * 1000 == pytest.approx(decoded, abs=1e-3)


def test_local_expectation_is_sub_bin_and_blind_outside_its_window():
    far_K = gaussian_logits(500.3).softmax(-1) + 0.3 * gaussian_logits(700).softmax(-1)
    assert local_expectation(far_K.log()).item() * 1000 == pytest.approx(500.3, abs=0.01)
    assert local_expectation(gaussian_logits(500.3), radius_bins=0).item() == 0.5


def test_top_k_expectation_limits():
    logits_K = gaussian_logits(321.4)
    assert top_k_expectation(logits_K, keep_bins=1).item() == pytest.approx(argmax(logits_K).item())
    assert top_k_expectation(logits_K, keep_bins=1000).item() == pytest.approx(expectation(logits_K).item(), rel=1e-12)


def test_median_minimises_the_expected_absolute_error():
    torch.manual_seed(3)
    logits_NK = 3 * torch.randn(5, 1000, dtype=torch.float64)
    cost_NK = (logits_NK.softmax(-1)[:, None, :] * (BINS[:, None] - BINS[None, :]).abs()).sum(-1)
    assert torch.equal((median(logits_NK) * 1000).round().long(), cost_NK.argmin(-1))


def test_straight_through_is_argmax_forward_and_expectation_backward():
    logits_K = two_modes().requires_grad_()
    hard = straight_through(logits_K, 0.8)
    assert hard.item() == pytest.approx(0.3, abs=1e-12)
    through = torch.autograd.grad(hard, logits_K)[0]
    soft = torch.autograd.grad(expectation(logits_K, 0.8), logits_K)[0]
    assert torch.equal(through, soft)


@pytest.mark.parametrize("rule", ["exp", "st", "local", "top_k"])
def test_differentiable_rules_pass_a_gradient(rule):
    logits_K = gaussian_logits(500.3).requires_grad_()
    DECODE_RULES[rule](logits_K).backward()
    assert logits_K.grad.abs().max() > 1e-5


@pytest.mark.parametrize("rule", DECODE_RULES)
def test_shapes_ranges_and_extreme_logits(rule):
    decode = DECODE_RULES[rule]
    logits_B4K = torch.full((3, 4, 1000), -1e4).bfloat16()
    logits_B4K[0, :, 0], logits_B4K[1, :, 999] = 1e4, 1e4
    coords_B4 = decode(logits_B4K, 0.7)
    assert coords_B4.shape == (3, 4)
    assert coords_B4.dtype == torch.float32
    assert coords_B4[0].tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert coords_B4[1].tolist() == pytest.approx([0.999] * 4)
    assert ((coords_B4 >= 0) & (coords_B4 <= 0.999)).all()
    assert decode(torch.zeros(0, 1000), 1.0).shape == (0,)
