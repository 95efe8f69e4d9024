"""`coord_diag/*`: what the coordinate distributions look like, as sums and counts that add up over packs and ranks.

N slots, V vocabulary, K bins, M metrics, H histogram cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.geometry.bins import MAX_BIN, NUM_BINS
from coordexp.losses.coord_terms import soft_cross_entropy
from coordexp.losses.partition import CoordSlots, at_least_float32, scale
from coordexp.losses.soft_targets import SoftTarget, rounded_bins, target_entropy

COORD_METRICS = (
    "p_gt_mean",  # p_t of the rounded target bin t
    "acc_top5",  # share of slots where fewer than 5 bins are likelier than t
    "margin_mean",  # log p_t - log of the best other bin; falls under a soft target, whose optimum is no peak
    "expected_bin_mae",  # |E[k] - y| in bins, y unrounded (older notes of others report E|k - t| under this name)
    "w1_to_delta",  # E|k - t| / (K - 1): the distance to the hard target, in the unit of the w1 term
    "softce_kl",  # KL(q || p) = softCE - H(q), nats: the part of softCE that can reach 0
    "coord_vocab_mass_mean",  # m = P(coordinate ids)
)
TOP_BINS = 5
CELL_BINS = 0.25  # resolution of the error quantiles
NUM_CELLS = int(MAX_BIN / CELL_BINS) + 1


@dataclass(frozen=True, slots=True)
class CoordDiagnostics:
    """Sums over coordinate slots: add those of micro-batches, all-reduce the three tensors over ranks, then summarise.

    sums_M: sums of COORD_METRICS. slots: number of slots. abs_err_cells_H: histogram of |E[k] - y| in CELL_BINS cells.
    """

    sums_M: Tensor
    slots: Tensor
    abs_err_cells_H: Tensor

    def __add__(self, other: CoordDiagnostics) -> CoordDiagnostics:
        return CoordDiagnostics(
            self.sums_M + other.sums_M, self.slots + other.slots, self.abs_err_cells_H + other.abs_err_cells_H
        )

    def summary(self) -> dict[str, float]:
        """Means by name, the 90th percentile `expected_bin_abs_err_p90`, and `coord_tokens`; no means without slots."""
        slots = float(self.slots)
        if slots == 0:
            return {"coord_tokens": 0.0}
        means = {name: float(total) / slots for name, total in zip(COORD_METRICS, self.sums_M, strict=True)}
        p90 = histogram_quantile(self.abs_err_cells_H, 0.9)
        return {**means, "expected_bin_abs_err_p90": p90, "coord_tokens": slots}


@torch.no_grad()
def slot_diagnostics(
    slots: CoordSlots, target_bins_N: Tensor, target: SoftTarget, temperature: float
) -> CoordDiagnostics:
    """Diagnostics from what is kept of the logits of N coordinate slots, made at the same temperature; no gradient."""
    log_p_NK = F.log_softmax(scale(at_least_float32(slots.logits_NK), temperature), dim=-1)
    p_NK = log_p_NK.exp()
    q_NK = target.distribution(target_bins_N, dtype=log_p_NK.dtype)
    t_N1 = rounded_bins(target_bins_N)[:, None]
    log_p_t_N1 = log_p_NK.gather(-1, t_N1)
    best_other_N = log_p_NK.scatter(-1, t_N1, -torch.inf).amax(-1)
    bins_K = torch.arange(NUM_BINS, dtype=p_NK.dtype, device=p_NK.device)
    abs_err_N = ((p_NK * bins_K).sum(-1) - target_bins_N.to(p_NK)).abs()
    values = {
        "p_gt_mean": log_p_t_N1[:, 0].exp(),
        "acc_top5": ((log_p_NK > log_p_t_N1).sum(-1) < TOP_BINS).to(p_NK),
        "margin_mean": log_p_t_N1[:, 0] - best_other_N,
        "expected_bin_mae": abs_err_N,
        "w1_to_delta": (p_NK * (bins_K - t_N1).abs()).sum(-1) / MAX_BIN,
        "softce_kl": soft_cross_entropy(log_p_NK, q_NK) - target_entropy(q_NK),
        "coord_vocab_mass_mean": slots.mass_N,
    }
    cells_N = (abs_err_N / CELL_BINS).long().clamp(0, NUM_CELLS - 1)
    return CoordDiagnostics(
        sums_M=torch.stack([values[name].sum() for name in COORD_METRICS]).double(),
        slots=torch.tensor(float(len(abs_err_N)), dtype=torch.float64, device=p_NK.device),
        abs_err_cells_H=torch.bincount(cells_N, minlength=NUM_CELLS).double(),
    )


def histogram_quantile(cells_H: Tensor, quantile: float) -> float:
    """Quantile in bins of a histogram with cells of CELL_BINS, linear within a cell; off by at most one cell."""
    cdf_H = cells_H.double().cumsum(0)
    wanted = quantile * float(cdf_H[-1])
    cell = int((cdf_H < wanted).sum())
    below = float(cdf_H[cell - 1]) if cell else 0.0
    return (cell + (wanted - below) / float(cells_H[cell])) * CELL_BINS
