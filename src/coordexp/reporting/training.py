"""The losses of a training log: first and last values, and the distance from their lower bounds.

A log is the table of `infra/logs.py`; its columns are in the order of the objective.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from coordexp.config.block import field_specs
from coordexp.config.schema import Params
from coordexp.errors import DataError
from coordexp.evaluation.table import Floats
from coordexp.infra.logs import BIN_ERROR, COORD_SUM, ends, logged
from coordexp.reporting.markdown import MISSING, percent, significant, table

MEANINGS = {
    "softce_kl": "softCE minus the entropy of the target (nats): the part that can reach 0",
    "expected_bin_mae": "mean error of E[k], bins",
    "expected_bin_abs_err_p90": "90th percentile of the error of E[k], bins",
    "p_gt_mean": "probability of the target bin",
    "acc_top5": "fraction of slots whose target bin is among the five most probable",
    "margin_mean": "log-margin of the target bin over the best other bin; a soft target does not maximize it",
    "w1_to_delta": "W1 distance to the hard target, as a fraction of the axis",
    "coord_vocab_mass_mean": "probability of any coordinate token",
}
# In addition, for held-out slots (`losses/coord_terms.py:distribution_shape`).
SHAPES = {
    "gate": "-log P(any coordinate token), nats",
    "second_peak": "fraction of distributions with a second peak",
    "mean_off_peak": "fraction of slots where E[k] has low probability: mean collapse between several peaks",
    "coverage_50": "fraction of targets inside the central 50 % of the distribution; 0.5 if its width is calibrated",
    "coverage_90": "the same for the central 90 %",
}
OTHER_UNITS = (
    "softce_kl",
    "expected_bin_mae",
    "margin_mean",
    "gate",
)  # nats and bins; all others are in [0, 1]
SLOTS = "coord_diag/coord_tokens"
CORRELATED = ("raw/softce", "raw/w1", "raw/gate", "raw/coord_ce", "raw/text_ce", BIN_ERROR)
ZERO_FLOOR_DIAGNOSTICS = ("softce_kl", "w1_to_delta", "expected_bin_mae", "expected_bin_abs_err_p90")
NO_FLOOR = ("total", COORD_SUM, "text_ce", "entropy")  # their lower bound is not known
_FLAT = 0.02  # a smaller relative change above the lower bound is reported as flat
HEADER = ["quantity", "meaning", "first tenth", "last tenth", "lower bound", "change", "fraction of final loss"]


def channels(log: pd.DataFrame) -> list[str]:
    """The channels that occur, sorted; empty for a stage without channels."""
    return sorted(log["channel"].dropna().unique()) if "channel" in log else []


def of_channel(log: pd.DataFrame, channel: str) -> pd.DataFrame:
    """Only the rows of one channel, and only the columns that it logs."""
    return log[log["channel"] == channel].dropna(axis="columns", how="all")


def loss_columns(log: pd.DataFrame) -> list[str]:
    """The total, then the weighted terms in the order of the objective."""
    return sorted((c for c in log.columns if c.startswith("loss/")), key=lambda column: column != "loss/total")


def training_table(log: pd.DataFrame, params: Params, stage: str) -> str:
    """Weighted losses with lower bounds and fractions, raw unweighted terms, and diagnostics of a stage or channel."""
    total = ends(log, "loss/total")
    rows = []
    for column in loss_columns(log):
        term = column.removeprefix("loss/")
        share_of = total[1] if total and term != "total" else None
        rows.append(_row(log, column, term_meaning(term), loss_floor(term, params, stage), share_of))
    raw = [c for c in log.columns if c.startswith("raw/") and c.replace("raw/", "loss/", 1) not in log]
    rows += [_row(log, c, f"{term_meaning(c.removeprefix('raw/'))} (weight 0)", None, None) for c in raw]
    for area, whose in (("coord_diag", ""), ("coord_diag_a1", "first forward: ")):
        for name, meaning in MEANINGS.items():
            column = f"{area}/{name}"
            if column in log.columns:
                floor = 0.0 if name in ZERO_FLOOR_DIAGNOSTICS else None
                rows.append(_row(log, column, whose + meaning, floor, None))
    return table(HEADER, rows, "llrrrrr")


def term_meaning(term: str) -> str:
    """The meaning of a term of the objective, in the words of its weight in the parameters."""
    sums = {"total": "sum of all terms", COORD_SUM: "sum of the coordinate terms"}
    meanings = {spec.key.split(".")[-1]: spec.description for spec in field_specs(Params)}
    return sums.get(term) or meanings.get(f"{term}_weight", "")


def loss_floor(term: str, params: Params, stage: str) -> float | None:
    """The lower bound of a weighted term; None if it is not known."""
    if term == "softce":
        weights = params if stage == "stage2" else params.stage1
        return weights.softce_weight * target_entropy_nats(params.target, params.sigma, params.truncate)
    return None if term in NO_FLOOR or term.startswith("a1_") else 0.0


def _row(log: pd.DataFrame, column: str, meaning: str, floor: float | None, total: float | None) -> list[str]:
    found = ends(log, column)
    assert found is not None, f"{column} has no values"
    first, last = found
    shown_floor = MISSING if floor is None else significant(floor)
    share = percent(last / total) if total else ""
    change = change_above_floor(first, last, floor or 0.0)
    return [f"`{column}`", meaning, significant(first), significant(last), shown_floor, change, share]


def change_above_floor(first: float, last: float, floor: float) -> str:
    """Relative change of the part above the lower bound, "flat" below 2 %; n/a if the first value is not above it."""
    if first <= floor:
        return MISSING
    change = (last - floor) / (first - floor) - 1
    return "flat" if abs(change) < _FLAT else f"{100 * change:+.0f} %"


def training_sentence(log: pd.DataFrame, params: Params) -> str:
    """The two main numbers: softCE with its lower bound, and the error in bins; empty if neither was logged."""
    entropy = target_entropy_nats(params.target, params.sigma, params.truncate)
    parts = []
    softce, kl = ends(log, "raw/softce"), ends(log, "coord_diag/softce_kl")
    if softce is not None and kl is not None:
        parts.append(
            f"unweighted softCE went from {softce[0]:.3f} to {softce[1]:.3f} nats with a lower bound of {entropy:.3f}; "
            f"the KL above the bound went from {kl[0]:.3f} to {kl[1]:.3f}"
        )
    if (mae := ends(log, BIN_ERROR)) is not None:
        parts.append(f"the mean error of the expected coordinate went from {mae[0]:.1f} to {mae[1]:.1f} bins")
    return (". ".join(part[0].upper() + part[1:] for part in parts) + ".") if parts else ""


def w1_fraction(log: pd.DataFrame) -> float | None:
    """The fraction of W1 in softCE + W1 in the last tenth of a run; None if one is not trained, or both are 0."""
    softce, w1 = ends(log, "loss/softce"), ends(log, "loss/w1")
    if softce is None or w1 is None or not softce[1] + w1[1]:
        return None
    return w1[1] / (softce[1] + w1[1])


def w1_sentence(log: pd.DataFrame) -> str:
    """The fraction of W1 in the coordinate losses at the end; empty if there is none."""
    fraction = w1_fraction(log)
    return "" if fraction is None else f"W1 is {percent(fraction)} of softCE + W1 at the end."


def slot_correlations(log: pd.DataFrame) -> dict[str, float | None]:
    """Pearson's correlation over steps of each loss with the number of coordinate slots in the step.

    A loss is a mean over slots: if crowded batches are harder, its curve rises and falls with the batches.
    """
    found: dict[str, float | None] = {}
    for column in CORRELATED:
        both = pd.concat([logged(log, SLOTS), logged(log, column)], axis=1).dropna()
        varies = len(both) > 2 and bool((both.nunique() > 1).all())
        found[column] = float(np.corrcoef(both.to_numpy().T)[0, 1]) if varies else None
    return found


def correlations_sentence(log: pd.DataFrame) -> str:
    """The correlations in a line; empty if there is none."""
    known = {column: value for column, value in slot_correlations(log).items() if value is not None}
    words = ", ".join(f"`{column}` {value:+.2f}" for column, value in known.items())
    return f"Correlation over steps with the number of coordinate slots in a step: {words}." if known else ""


def counters_table(log: pd.DataFrame) -> str:
    """The log of channel B: counters (`*_total`) summed over its steps, other values at both ends."""
    own = {"lr", "grad_norm", "tokens", "samples", "channel"}
    areas = ("loss/", "raw/", "coord_diag/", "coord_diag_a1/", "grad/", "time/")
    rows = []
    for name in sorted(name for name in log.columns if name not in own and not name.startswith(areas)):
        if name.endswith("_total"):
            rows.append([f"`{name}`", f"{logged(log, name).sum():.0f}", "sum over steps"])
        elif (found := ends(log, name)) is not None:
            rows.append([f"`{name}`", f"{significant(found[0])} to {significant(found[1])}", "first to last tenth"])
    return table(["logged by channel B", "value", "aggregation"], rows, "lrl")


def target_entropy_nats(kind: str, sigma: float, truncate: int) -> float:
    """Entropy of the soft target away from the borders, in nats: the lower bound of softCE, reached only when p = q.

    The entropy of a two-bin target varies; its mean over targets uniform between two bins is exactly 1/2.
    """
    distance = np.abs(np.arange(-truncate, truncate + 1))
    match kind:
        case "gaussian":
            return entropy_nats(np.exp(-0.5 * (distance / sigma) ** 2))
        case "triangular":
            return entropy_nats(truncate + 1.0 - distance)
        case "two_bin":
            return 0.5
    raise DataError(f"target: found {kind!r}, expected gaussian, triangular or two_bin.")


def entropy_nats(weights: Floats | Sequence[float]) -> float:
    """Entropy of positive weights after normalisation."""
    q = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    return float(-(q * np.log(q)).sum())
