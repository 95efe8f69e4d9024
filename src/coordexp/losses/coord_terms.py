"""Coordinate slots: soft targets, loss terms (the CoordExp objective) and diagnostics of the distributions.

For one slot with logits z over V, coordinate slice s, temperature T: p = softmax(s / T) over the K = 1000 bins,
P = softmax(z / T) over V, m = P(coordinate ids), target distribution q, rounded target bin t.

    softce    -sum q log p                    gradient on s  (p - q) / T
    w1        sum |CDF_p - CDF_q| / (K - 1)   bounded by sd(p) / (T (K - 1)): refines, cannot repair
    gate      -log m                          the only term that depends on the other V - K ids
    coord_ce  -log p_t, always at T = 1       coord_ce + gate at T = 1 is exactly ordinary cross-entropy
    entropy   -sum p log p                    weight > 0 discourages several modes, < 0 overconfidence

Target distributions q are built from unrounded target bins y in [0, 999]; sigma and truncate are in bins. The first and
last bin cut off the kernel, and the rest is renormalized without reflection or wrap-around. Near a border the mean of a
broad target therefore lies inward of the target (1.3 bins at bin 0 for sigma 2).

N slots, V vocabulary, K bins, W bins of a window, M metrics, H histogram cells. Computation is in float32 (float64
stays float64).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.config.schema import Params
from coordexp.geometry.bins import MAX_BIN, NUM_BINS
from coordexp.losses.readout import LOCAL_RADIUS_BINS
from coordexp.losses.terms import at_least_float32, term

COORD_METRICS = (
    "p_gt_mean",  # p_t of the rounded target bin t
    "acc_top5",  # fraction of slots where fewer than 5 bins are more probable than t
    "margin_mean",  # log p_t - log of the best other bin; falls under a soft target, whose optimum is not a peak
    "expected_bin_mae",  # |E[k] - y| in bins, y unrounded (other projects report E|k - t| under this name)
    "w1_to_delta",  # E|k - t| / (K - 1): distance to the hard target, in the unit of the w1 term
    "softce_kl",  # KL(q || p) = softCE - H(q), nats: the part of softCE that can reach 0
    "coord_vocab_mass_mean",  # m = P(coordinate ids)
)
# Reported for held-out slots only: whether distributions have one peak, and whether their widths are calibrated.
SHAPE_METRICS = (
    "gate",  # -log m, nats
    "second_peak",  # slots with a second peak: see `distribution_shape`
    "mean_off_peak",  # slots whose E[k] lies where the distribution has little mass ("mean collapse")
    "coverage_50",  # slots whose y lies in the central 50 % of p; 0.5 if the width is calibrated
    "coverage_90",  # the same for 90 %
)
LEAST_PEAK_MASS = 0.1  # that a second peak needs
COVERAGES = (0.5, 0.9)
TOP_BINS = 5
CELL_BINS = 0.25  # resolution of the error quantiles
NUM_CELLS = int(MAX_BIN / CELL_BINS) + 1


class CoordSlots:
    """N supervised coordinate slots: the inputs of terms and diagnostics, each computed once, on first use.

    Args:
        logits_NK: logits of the coordinate ids (N may be 0); any float dtype.
        text_log_odds_N: log((1 - m) / m) at the temperature.
        target_bins_N: unrounded target bins in [0, 999].
        params: target family, sigma and truncate of q; temperature T, which applies to all but `log_p_at_1_NK`.
    """

    def __init__(
        self,
        logits_NK: Tensor,
        text_log_odds_N: Tensor,
        target_bins_N: Tensor,
        params: Params,
    ) -> None:
        self.logits_NK = at_least_float32(logits_NK)
        self.text_log_odds_N = text_log_odds_N
        self.target_bins_N = target_bins_N
        self.temperature = params.temperature
        self._params = params

    @cached_property
    def log_p_NK(self) -> Tensor:
        """log p."""
        logits_NK = self.logits_NK if self.temperature == 1 else self.logits_NK / self.temperature
        return F.log_softmax(logits_NK, dim=-1)

    @cached_property
    def log_p_at_1_NK(self) -> Tensor:
        """log p at T = 1."""
        return self.log_p_NK if self.temperature == 1 else F.log_softmax(self.logits_NK, dim=-1)

    @cached_property
    def p_NK(self) -> Tensor:
        """p."""
        return self.log_p_NK.exp()

    @cached_property
    def q_NK(self) -> Tensor:
        """Target distributions."""
        kind, sigma, truncate = self._params.target, self._params.sigma, self._params.truncate
        return soft_target(self.target_bins_N, kind, sigma, truncate, self.logits_NK.dtype)

    @cached_property
    def label_N(self) -> Tensor:
        """Rounded target bins t, int64."""
        return rounded_bins(self.target_bins_N)


@term("softce", "coord")
def soft_cross_entropy(log_p_NK: Tensor, q_NK: Tensor) -> Tensor:
    """(N,) -sum_k q_k log p_k in nats; its minimum is the entropy of q, not 0."""
    return -(q_NK * log_p_NK).sum(-1)


@term("w1", "coord")
def wasserstein1(p_NK: Tensor, q_NK: Tensor) -> Tensor:
    """(N,) W1 between two distributions over bins, divided by K - 1: W1(delta_a, delta_b) = |a - b| / 999, in [0, 1].

    In one dimension W1 is the L1 distance between the CDFs (Peyre and Cuturi 2019, arXiv:1803.00567, section 2.6), so
    no transport problem is solved. The cumulative sum of p - q, unlike the difference of two CDFs, keeps float32
    rounding small where both CDFs are near 1. The last entry is 1 - 1 and is left out.
    """
    return (p_NK - q_NK).cumsum(-1)[:, :-1].abs().sum(-1) / MAX_BIN


@term("gate", "coord")
def gate(text_log_odds_N: Tensor) -> Tensor:
    """(N,) -log m >= 0: logsumexp over the vocabulary minus logsumexp over the coordinate slice."""
    # m = sigmoid(-odds). The difference of the two logsumexps would lose all digits as m approaches 1, because they
    # agree in all of them; logsigmoid of the log-odds keeps relative precision there and has a bounded gradient.
    return -F.logsigmoid(-text_log_odds_N)


@term("coord_ce", "coord")
def hard_cross_entropy(log_p_at_1_NK: Tensor, label_N: Tensor) -> Tensor:
    """(N,) -log p_t in nats for the integer target bins."""
    return -log_p_at_1_NK.gather(-1, label_N[:, None]).squeeze(-1)


@term("entropy", "coord", signed=True)
def entropy(log_p_NK: Tensor) -> Tensor:
    """(N,) entropy of p in nats."""
    return -(log_p_NK.exp() * log_p_NK).sum(-1)


def rounded_bins(target_bins_N: Tensor) -> Tensor:
    """(N,) int64 target bins t: the nearest bin in 0..999, which is also the token in the text."""
    return target_bins_N.round().clamp(0, MAX_BIN).long()


def soft_target(
    target_bins_N: Tensor, kind: str, sigma: float, truncate: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(N, K) target distributions of the family `kind` for unrounded target bins (N,); rows sum to 1."""
    match kind:
        case "gaussian":
            return gaussian_target(target_bins_N, sigma, truncate, dtype)
        case "triangular":
            return triangular_target(target_bins_N, truncate, dtype)
        case "two_bin":
            return two_bin_target(target_bins_N, dtype)
    raise AssertionError(f"target {kind!r} is not a family of target distributions")


def gaussian_target(target_bins_N: Tensor, sigma: float, truncate: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """q(k) ~ exp(-((k - t) / sigma)^2 / 2) for |k - t| <= truncate, centered on the rounded bin t."""
    return _windowed(target_bins_N, truncate, lambda distance: torch.exp(-0.5 * (distance / sigma) ** 2), dtype)


def triangular_target(target_bins_N: Tensor, truncate: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """q(k) ~ truncate + 1 - |k - t|: as for the Gaussian, `truncate` is the largest distance with mass."""
    return _windowed(target_bins_N, truncate, lambda distance: truncate + 1 - distance, dtype)


def two_bin_target(target_bins_N: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mass 1 - f on floor(y) and f on the next bin, so that mean(q) == y exactly, between bins as well.

    Distribution focal loss (Li et al. 2020, arXiv:2006.04388, eq. 6). y = 999 is bin 998 with f = 1.
    """
    y_N = target_bins_N.to(dtype).clamp(0, MAX_BIN)
    lower_N = y_N.floor().clamp(max=MAX_BIN - 1)
    fraction_N = y_N - lower_N
    pair_N2 = torch.stack([1 - fraction_N, fraction_N], dim=-1)
    return _scattered(torch.stack([lower_N, lower_N + 1], dim=-1).long(), pair_N2)


def target_entropy(target_NK: Tensor) -> Tensor:
    """(N,) entropy H(q) in nats: the lower bound of softCE. KL(q || p) = softCE - H(q) can reach 0."""
    return -torch.xlogy(target_NK, target_NK).sum(-1)


def _windowed(target_bins_N: Tensor, truncate: int, kernel: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """(N, K) kernel(|k - t|) for |k - t| <= truncate, renormalized.

    Only a window of W bins around t is computed and then scattered: ten times faster than evaluating all K.
    """
    width = min(2 * truncate + 1, NUM_BINS)
    t_N1 = rounded_bins(target_bins_N)[:, None]
    # Near a border the window shifts inward, so that all of its bins exist and are distinct.
    first_N1 = (t_N1 - truncate).clamp(0, NUM_BINS - width)
    bins_NW = first_N1 + torch.arange(width, device=t_N1.device)
    distance_NW = (bins_NW - t_N1).abs()
    mass_NW = kernel(distance_NW.to(dtype)).masked_fill(distance_NW > truncate, 0)
    mass_NW = mass_NW / mass_NW.sum(-1, keepdim=True)
    return _scattered(bins_NW, mass_NW)


def _scattered(bins_NW: Tensor, mass_NW: Tensor) -> Tensor:
    """(N, K) zeros with mass_NW at bins_NW, whose bins are distinct within a row."""
    return mass_NW.new_zeros(len(mass_NW), NUM_BINS).scatter(-1, bins_NW, mass_NW)


@dataclass(frozen=True, slots=True)
class CoordDiagnostics:
    """Sums over coordinate slots: add them over micro-batches and processes, then call `summary`.

    sums_M: sums of COORD_METRICS. slots: number of slots. abs_err_cells_H: histogram of |E[k] - y| in cells of
    CELL_BINS.
    """

    sums_M: Tensor
    slots: Tensor
    abs_err_cells_H: Tensor

    def __add__(self, other: CoordDiagnostics) -> CoordDiagnostics:
        return CoordDiagnostics(
            self.sums_M + other.sums_M, self.slots + other.slots, self.abs_err_cells_H + other.abs_err_cells_H
        )

    def summary(self) -> dict[str, float]:
        """Means by name, the 90th percentile `expected_bin_abs_err_p90`, and `coord_tokens`; for 0 slots only that."""
        slots = float(self.slots)
        if slots == 0:
            return {"coord_tokens": 0.0}
        means = {name: float(total) / slots for name, total in zip(COORD_METRICS, self.sums_M, strict=True)}
        p90 = histogram_quantile(self.abs_err_cells_H, 0.9)
        return {**means, "expected_bin_abs_err_p90": p90, "coord_tokens": slots}


@torch.no_grad()
def slot_diagnostics(slots: CoordSlots) -> CoordDiagnostics:
    """Diagnostics of N coordinate slots, on the CPU and without gradient."""
    values = _slot_values(slots)
    abs_err_N = values["expected_bin_mae"]
    cells_N = (abs_err_N / CELL_BINS).long().clamp(0, NUM_CELLS - 1)
    return CoordDiagnostics(
        sums_M=torch.stack([values[name].sum() for name in COORD_METRICS]).double().cpu(),
        slots=torch.tensor(float(len(abs_err_N)), dtype=torch.float64),
        abs_err_cells_H=torch.bincount(cells_N, minlength=NUM_CELLS).double().cpu(),
    )


@torch.no_grad()
def held_out_diagnostics(slots: CoordSlots) -> dict[str, float]:
    """Means of COORD_METRICS and SHAPE_METRICS over the slots; empty if there are no slots."""
    if not len(slots.label_N):
        return {}
    values = {**_slot_values(slots), "gate": gate(slots.text_log_odds_N), **distribution_shape(slots)}
    return {name: float(values[name].double().mean()) for name in (*COORD_METRICS, *SHAPE_METRICS)}


def distribution_shape(slots: CoordSlots) -> dict[str, Tensor]:
    """(N,) 1 or 0 by name: the last four of SHAPE_METRICS.

    The mass near a bin is the mass within LOCAL_RADIUS_BINS of it; the peak is the bin where this is largest. A second
    peak has at least LEAST_PEAK_MASS near it, and a bin with at most half as much lies between it and the peak. E[k] is
    off the peak if the mass near it is at most half the mass near the peak: between two peaks, the expectation is a
    position to which the model assigns little probability. A bin is uniform mass over [k - 1/2, k + 1/2].
    """
    p_NK, width = slots.p_NK, 2 * LOCAL_RADIUS_BINS + 1
    bins_K = torch.arange(NUM_BINS, device=p_NK.device)
    near_NK = F.avg_pool1d(p_NK[:, None], width, stride=1, padding=LOCAL_RADIUS_BINS)[:, 0] * width
    peak_N1 = near_NK.argmax(-1, keepdim=True)
    right_NK = near_NK.masked_fill(bins_K < peak_N1, torch.inf).cummin(-1).values
    left_NK = near_NK.masked_fill(bins_K > peak_N1, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    valley_NK = torch.minimum(left_NK, right_NK)  # smallest mass near any bin between the peak and here
    mean_N1 = (p_NK * bins_K).sum(-1, keepdim=True).round().long()
    y_N1 = slots.target_bins_N.to(p_NK)[:, None]
    t_N1 = slots.label_N[:, None]
    below_N1 = p_NK.cumsum(-1).gather(-1, t_N1) - p_NK.gather(-1, t_N1) * (0.5 + t_N1 - y_N1)  # F(y)
    return {
        "second_peak": ((near_NK >= LEAST_PEAK_MASS) & (2 * valley_NK <= near_NK)).any(-1).to(p_NK),
        "mean_off_peak": (2 * near_NK.gather(-1, mean_N1) <= near_NK.gather(-1, peak_N1))[:, 0].to(p_NK),
        **{f"coverage_{round(100 * c)}": ((below_N1 - 0.5).abs() <= c / 2)[:, 0].to(p_NK) for c in COVERAGES},
    }


def _slot_values(slots: CoordSlots) -> dict[str, Tensor]:
    """(N,) COORD_METRICS by name."""
    log_p_NK, p_NK, q_NK, t_N1 = slots.log_p_NK, slots.p_NK, slots.q_NK, slots.label_N[:, None]
    log_p_t_N1 = log_p_NK.gather(-1, t_N1)
    best_other_N = log_p_NK.scatter(-1, t_N1, -torch.inf).amax(-1)
    bins_K = torch.arange(NUM_BINS, dtype=p_NK.dtype, device=p_NK.device)
    return {
        "p_gt_mean": log_p_t_N1[:, 0].exp(),
        "acc_top5": ((log_p_NK > log_p_t_N1).sum(-1) < TOP_BINS).to(p_NK),
        "margin_mean": log_p_t_N1[:, 0] - best_other_N,
        "expected_bin_mae": expected_bin_errors(slots),
        "w1_to_delta": (p_NK * (bins_K - t_N1).abs()).sum(-1) / MAX_BIN,
        "softce_kl": soft_cross_entropy(log_p_NK, q_NK) - target_entropy(q_NK),
        "coord_vocab_mass_mean": torch.sigmoid(-slots.text_log_odds_N),
    }


def expected_bin_errors(slots: CoordSlots) -> Tensor:
    """(N,) |E[k] - y| in bins."""
    bins_K = torch.arange(NUM_BINS, dtype=slots.p_NK.dtype, device=slots.p_NK.device)
    return ((slots.p_NK * bins_K).sum(-1) - slots.target_bins_N.to(slots.p_NK)).abs()


def histogram_quantile(cells_H: Tensor, quantile: float) -> float:
    """Quantile in bins of a histogram with cells of CELL_BINS, linear within a cell; exact to within one cell."""
    cdf_H = cells_H.double().cumsum(0)
    wanted = quantile * float(cdf_H[-1])
    cell = int((cdf_H < wanted).sum())
    below = float(cdf_H[cell - 1]) if cell else 0.0
    return (cell + (wanted - below) / float(cells_H[cell])) * CELL_BINS
