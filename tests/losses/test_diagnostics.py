"""Coordinate diagnostics: hand-made distributions, and independence of how slots are packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coordexp.losses.coord_terms import (
    CELL_BINS,
    COORD_METRICS,
    SHAPE_METRICS,
    CoordDiagnostics,
    held_out_diagnostics,
    histogram_quantile,
    slot_diagnostics,
    soft_target,
    target_entropy,
)
from loss_reference import coord_slots, coord_sums

FIRST_ID = 6
VOCAB = FIRST_ID + 1000 + 4


def logits_from(bins_to_mass: dict[int, float], coord_mass: float) -> torch.Tensor:
    """One row (1, V) whose softmax puts `coord_mass` on these bins in these fractions and the rest on token 0."""
    prob_V = torch.full((VOCAB,), 1e-30, dtype=torch.float64)
    prob_V[0] = 1 - coord_mass
    for k, share in bins_to_mass.items():
        prob_V[FIRST_ID + k] = coord_mass * share
    return prob_V.log()[None]


def diagnose(logits_NV: torch.Tensor, y_N: torch.Tensor, **changes: object) -> CoordDiagnostics:
    return slot_diagnostics(coord_slots(logits_NV, y_N, FIRST_ID, **changes))


def test_a_distribution_by_hand():
    logits_NV = logits_from({100: 0.5, 102: 0.3, 110: 0.2}, coord_mass=0.8)
    diagnostics = diagnose(logits_NV, torch.tensor([102.25]), target="triangular", truncate=1)
    summary = diagnostics.summary()
    expected_bin = 0.5 * 100 + 0.3 * 102 + 0.2 * 110
    assert summary["p_gt_mean"] == pytest.approx(0.3)
    assert summary["acc_top5"] == 1.0
    assert summary["margin_mean"] == pytest.approx(np.log(0.3 / 0.5))
    assert summary["expected_bin_mae"] == pytest.approx(abs(expected_bin - 102.25))
    assert summary["w1_to_delta"] == pytest.approx((0.5 * 2 + 0.2 * 8) / 999)
    assert summary["coord_vocab_mass_mean"] == pytest.approx(0.8)
    assert summary["coord_tokens"] == 1


def test_margin_is_positive_where_the_target_is_the_most_probable_bin():
    logits_NV = logits_from({100: 0.5, 102: 0.3, 110: 0.2}, coord_mass=0.8)
    summary = diagnose(logits_NV, torch.tensor([100.0])).summary()
    assert summary["margin_mean"] == pytest.approx(np.log(0.5 / 0.3))


def test_acc_top5_counts_strictly_more_probable_bins():
    shares = {10: 0.3, 20: 0.25, 30: 0.2, 40: 0.12, 50: 0.08, 60: 0.05}
    for target_bin, accuracy in ((50, 1.0), (60, 0.0)):
        summary = diagnose(logits_from(shares, 1 - 1e-9), torch.tensor([float(target_bin)])).summary()
        assert summary["acc_top5"] == accuracy


@pytest.mark.parametrize("kind", ["gaussian", "triangular", "two_bin"])
def test_kl_is_zero_at_the_target_and_softce_minus_entropy_elsewhere(kind):
    y_N = torch.tensor([500.25], dtype=torch.float64)
    q_NK = soft_target(y_N, kind, 2.0, 8, torch.float64)
    at_target_NV = torch.zeros(1, VOCAB, dtype=torch.float64)
    at_target_NV[:, FIRST_ID : FIRST_ID + 1000] = q_NK.clamp(min=1e-300).log()
    assert diagnose(at_target_NV, y_N, target=kind).summary()["softce_kl"] == pytest.approx(0, abs=1e-10)
    torch.manual_seed(1)
    logits_NV = torch.randn(1, VOCAB, dtype=torch.float64)
    softce = coord_sums(coord_slots(logits_NV, y_N, FIRST_ID, target=kind, temperature=0.8))["softce"].item()
    summary = diagnose(logits_NV, y_N, target=kind, temperature=0.8).summary()
    assert summary["softce_kl"] == pytest.approx(softce - target_entropy(q_NK).item())


def test_mass_is_the_exponential_of_the_gate():
    torch.manual_seed(2)
    logits_NV, y_N = torch.randn(1, VOCAB, dtype=torch.float64), torch.tensor([4.0])
    gate = coord_sums(coord_slots(logits_NV, y_N, FIRST_ID, temperature=0.7))["gate"]
    summary = diagnose(logits_NV, y_N, temperature=0.7).summary()
    assert summary["coord_vocab_mass_mean"] == pytest.approx(torch.exp(-gate).item())


def shape(bins_to_mass: dict[int, float], y: float) -> dict[str, float]:
    slots = coord_slots(logits_from(bins_to_mass, 0.999), torch.tensor([y], dtype=torch.float64), FIRST_ID)
    found = held_out_diagnostics(slots)
    assert set(found) == {*COORD_METRICS, *SHAPE_METRICS}
    assert found["gate"] == pytest.approx(-np.log(found["coord_vocab_mass_mean"]))
    summary = slot_diagnostics(slots).summary()
    assert {name: found[name] for name in COORD_METRICS} == pytest.approx(
        {name: summary[name] for name in COORD_METRICS}
    )
    return found


def bell(centre: float, sd: float, mass: float = 1.0) -> dict[int, float]:
    weights = np.exp(-0.5 * ((np.arange(1000) - centre) / sd) ** 2)
    return dict(enumerate(np.maximum(mass * weights / weights.sum(), 1e-30)))


def both(*parts: dict[int, float]) -> dict[int, float]:
    return {k: sum(part[k] for part in parts) for k in range(1000)}


@pytest.mark.parametrize(
    ("distribution", "second_peak", "mean_off_peak"),
    [
        (bell(500, 2), 0, 0),
        (bell(500, 80), 0, 0),  # broad is not several
        (bell(0, 3), 0, 0),  # cut by the border
        (both(bell(300, 2, 0.6), bell(340, 2, 0.4)), 1, 1),  # E[k] 316, between
        (both(bell(300, 2, 0.95), bell(900, 2, 0.05)), 0, 1),  # too little for a peak, enough to move the mean
        (both(bell(300, 2, 0.6), bell(306, 2, 0.4)), 0, 0),  # one place
        (both(bell(100, 2, 0.3), bell(500, 2, 0.4), bell(900, 2, 0.3)), 1, 0),  # the mean is on the largest
    ],
)
def test_second_peaks_need_a_valley_in_between(distribution, second_peak, mean_off_peak):
    found = shape(distribution, 500.0)
    assert (found["second_peak"], found["mean_off_peak"]) == (second_peak, mean_off_peak)


def test_targets_sampled_from_the_distribution_have_nominal_coverage():
    torch.manual_seed(5)
    logits_NV = torch.full((4000, VOCAB), -1e4)
    spread = torch.randn(4000, 1000)
    logits_NV[:, FIRST_ID : FIRST_ID + 1000] = 2 * spread
    drawn_N = (2 * spread).softmax(-1).multinomial(1)[:, 0] + torch.rand(4000) - 0.5
    found = held_out_diagnostics(coord_slots(logits_NV, drawn_N.clamp(0, 999), FIRST_ID))
    assert found["coverage_50"] == pytest.approx(0.5, abs=0.03)
    assert found["coverage_90"] == pytest.approx(0.9, abs=0.02)
    twice = held_out_diagnostics(coord_slots(logits_NV, drawn_N.clamp(0, 999), FIRST_ID, temperature=2.0))
    assert twice["coverage_90"] > found["coverage_90"]


def test_without_slots_there_are_no_shape_metrics():
    assert held_out_diagnostics(coord_slots(torch.zeros(0, VOCAB), torch.zeros(0), FIRST_ID)) == {}


@pytest.mark.parametrize("cuts", [(1, 2), (0, 30), (7, 19)])
def test_packing_does_not_change_the_summary(cuts):
    torch.manual_seed(3)
    logits_NV, y_N = 4 * torch.randn(30, VOCAB, dtype=torch.float64), 999 * torch.rand(30, dtype=torch.float64)

    first, second = cuts
    rows = (slice(0, first), slice(first, second), slice(second, 30))
    parts = [diagnose(logits_NV[part], y_N[part]) for part in rows]
    assert (parts[0] + parts[1] + parts[2]).summary() == pytest.approx(diagnose(logits_NV, y_N).summary(), rel=1e-9)


def test_p90_agrees_with_numpy_to_a_cell():
    torch.manual_seed(4)
    logits_NV = torch.zeros(400, VOCAB)
    centre_N = torch.randint(100, 900, (400,))
    logits_NV[torch.arange(400), FIRST_ID + centre_N] = 60.0
    errors_N = 20 * torch.randn(400)
    summary = diagnose(logits_NV, centre_N + errors_N).summary()
    expected = np.quantile(errors_N.abs().numpy(), 0.9)
    assert summary["expected_bin_abs_err_p90"] == pytest.approx(expected, abs=2 * CELL_BINS)
    assert summary["expected_bin_mae"] == pytest.approx(errors_N.abs().mean().item(), rel=1e-3)


def test_histogram_quantile_by_hand():
    cells_H = torch.tensor([0.0, 4.0, 0.0, 4.0])
    assert histogram_quantile(cells_H, 0.5) == 2 * CELL_BINS
    assert histogram_quantile(cells_H, 0.75) == 3.5 * CELL_BINS
    assert histogram_quantile(cells_H, 1.0) == 4 * CELL_BINS


def test_no_slots_no_gradient_and_extreme_logits():
    empty = diagnose(torch.zeros(0, VOCAB), torch.zeros(0))
    assert empty.summary() == {"coord_tokens": 0.0}
    logits_NV = torch.full((2, VOCAB), -1e4).bfloat16()
    logits_NV[0, FIRST_ID + 999], logits_NV[1, 0] = 1e4, 1e4
    logits_NV.requires_grad_()
    diagnostics = diagnose(logits_NV, torch.tensor([0.0, 999.0]), temperature=0.7)
    assert not diagnostics.sums_M.requires_grad
    summary = (empty + diagnostics).summary()
    assert set(summary) == {*COORD_METRICS, "expected_bin_abs_err_p90", "coord_tokens"}
    assert all(np.isfinite(value) for value in summary.values())
