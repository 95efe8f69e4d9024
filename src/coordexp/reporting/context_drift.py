"""Does the soft self-context of channel A cost accuracy: the last forward against the first, on the same slots.

The first forward (A1) reads the annotated coordinates, the last one (A2, with two forwards) its own. Both are logged in
every step of channel A with several forwards, so the difference is paired and needs no other model or data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from coordexp.evaluation.effect import LEVEL
from coordexp.reporting.training_log import TrainingLog

MAE = "expected_bin_mae"


@dataclass(frozen=True, slots=True)
class ContextDrift:
    """Mean error of E[k] in bins in either context over the steps that log both, and the t interval of the difference.

    The steps hold equally many samples and count alike; `lo` and `hi` are None with a single step.
    """

    n_steps: int
    first_bins: float
    last_bins: float
    lo: float | None
    hi: float | None

    @property
    def delta(self) -> float:
        """Last minus first: positive where the own context costs accuracy."""
        return self.last_bins - self.first_bins


def context_drift(log: TrainingLog) -> ContextDrift | None:
    """The drift over the logged steps of a run; None if no step logs both contexts."""
    none_S = np.full(len(log.step_S), np.nan)
    first_S, last_S = (log.columns.get(f"{area}/{MAE}", none_S) for area in ("coord_diag_a1", "coord_diag"))
    both_S = ~np.isnan(first_S) & ~np.isnan(last_S)
    n = int(both_S.sum())
    if n == 0:
        return None
    first, last = float(first_S[both_S].mean()), float(last_S[both_S].mean())
    if n == 1:
        return ContextDrift(n, first, last, None, None)
    standard_error = float((last_S - first_S)[both_S].std(ddof=1)) / n**0.5
    half_width = float(student.ppf(1 - LEVEL / 2, n - 1)) * standard_error
    return ContextDrift(n, first, last, last - first - half_width, last - first + half_width)


def drift_answer(log: TrainingLog, params: Mapping[str, Any]) -> tuple[str, str]:
    """Answer and evidence on the drift of A2 from A1."""
    if params["stage2"]["n_softctx_iter"] == 1:
        return "**none to measure**", "n_softctx_iter is 1: channel A is one forward, in the ground-truth context"
    drift = context_drift(log)
    if drift is None:
        return "**not shown**", "no step logs the first forward beside the last"
    errors = f"error of E[k] {drift.first_bins:.1f} bins at A1, {drift.last_bins:.1f} at A2"
    if drift.lo is None or drift.hi is None:
        return "**not shown**", f"{errors}, in one step"
    answer = "yes" if drift.lo > 0 else "no, A2 is nearer" if drift.hi < 0 else "not shown"
    bounds = f"{drift.delta:+.1f} [{drift.lo:+.1f}, {drift.hi:+.1f}]"
    return f"**{answer}**", f"{errors}, paired {bounds} (95 % t interval over {drift.n_steps} training steps)"
