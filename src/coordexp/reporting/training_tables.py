"""What the losses did: where they began, where they ended, and how far they are from what they cannot go below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordexp.config.schema import Params, Stage2Params
from coordexp.reporting.markdown import MISSING, percent, significant, table
from coordexp.reporting.training_log import TrainingLog, target_entropy_nats

MEANINGS = {
    "softce_kl": "softCE minus the target's entropy (nats): what can reach 0",
    "expected_bin_mae": "mean error of E[k], bins",
    "expected_bin_abs_err_p90": "90th percentile of the error of E[k], bins",
    "p_gt_mean": "probability of the target bin",
    "acc_top5": "target bin among the five likeliest",
    "margin_mean": "log-margin of the target bin over the best other; a soft target does not want a peak",
    "w1_to_delta": "W1 distance to the hard target, share of the axis",
    "coord_vocab_mass_mean": "probability of any coordinate token",
}
ZERO_FLOOR_DIAGNOSTICS = ("softce_kl", "w1_to_delta", "expected_bin_mae", "expected_bin_abs_err_p90")
_FLAT = 0.02  # a smaller relative change above the floor is called flat
HEADER = ["quantity", "what it is", "first tenth", "last tenth", "floor", "change", "share of loss at end"]


def training_table(log: TrainingLog, params: Mapping[str, Any], stage: str) -> str:
    """Losses (weighted) with floors and shares, then the coordinate diagnostics, of one stage or channel."""
    total = log.ends("loss/total")
    rows = []
    for column in log.names("loss/"):
        term = column.removeprefix("loss/")
        share_of = total[1] if total and term != "total" else None
        rows.append(_row(log, column, term_meaning(term), loss_floor(term, params, stage), share_of))
    for area, whose in (("coord_diag", ""), ("coord_diag_a1", "first forward: ")):
        for name, meaning in MEANINGS.items():
            column = f"{area}/{name}"
            if column in log.columns:
                floor = 0.0 if name in ZERO_FLOOR_DIAGNOSTICS else None
                rows.append(_row(log, column, whose + meaning, floor, None))
    return table(HEADER, rows, "llrrrrr")


def term_meaning(term: str) -> str:
    """What a term of the objective is, in the words of its weight in the parameters."""
    field = Params.model_fields.get(f"{term}_weight") or Stage2Params.model_fields.get(f"{term}_weight")
    return "sum of all terms" if term == "total" else field.description or "" if field else ""


def loss_floor(term: str, params: Mapping[str, Any], stage: str) -> float | None:
    """What a weighted term cannot go below; None where that is not known."""
    if term == "softce":
        weights = params if stage == "stage2" else params["stage1"]
        return weights["softce_weight"] * target_entropy_nats(params["target"], params["sigma"], params["truncate"])
    return 0.0 if term in ("w1", "gate", "text_gate", "coord_ce") or term.startswith("bbox") else None


def _row(log: TrainingLog, column: str, meaning: str, floor: float | None, total: float | None) -> list[str]:
    ends = log.ends(column)
    assert ends is not None, f"{column} has no values"
    first, last = ends
    shown_floor = MISSING if floor is None else significant(floor)
    share = percent(last / total) if total else ""
    change = change_above_floor(first, last, floor or 0.0)
    return [f"`{column}`", meaning, significant(first), significant(last), shown_floor, change, share]


def change_above_floor(first: float, last: float, floor: float) -> str:
    """Relative change of the part above the floor, "flat" below 2 %; n/a for a quantity that starts at or below it."""
    if first <= floor:
        return MISSING
    change = (last - floor) / (first - floor) - 1
    return "flat" if abs(change) < _FLAT else f"{100 * change:+.0f} %"


def training_sentence(log: TrainingLog, params: Mapping[str, Any]) -> str:
    """The two numbers that matter: softCE against its floor, and the error in bins; empty if neither was logged."""
    entropy = target_entropy_nats(params["target"], params["sigma"], params["truncate"])
    parts = []
    softce, kl = log.ends("raw/softce"), log.ends("coord_diag/softce_kl")
    if softce is not None and kl is not None:
        parts.append(
            f"unweighted softCE went from {softce[0]:.3f} to {softce[1]:.3f} nats against a floor of {entropy:.3f}; "
            f"the KL above the floor went from {kl[0]:.3f} to {kl[1]:.3f}"
        )
    if (mae := log.ends("coord_diag/expected_bin_mae")) is not None:
        parts.append(f"the mean error of the expected coordinate went from {mae[0]:.1f} to {mae[1]:.1f} bins")
    return (". ".join(part[0].upper() + part[1:] for part in parts) + ".") if parts else ""


def w1_share(log: TrainingLog) -> float | None:
    """W1's share of softCE + W1 in the last tenth of a run; None where one is not trained, or both are 0."""
    ends = [log.ends(f"loss/{term}") for term in ("softce", "w1")]
    if ends[0] is None or ends[1] is None or not ends[0][1] + ends[1][1]:
        return None
    return ends[1][1] / (ends[0][1] + ends[1][1])


def w1_sentence(log: TrainingLog) -> str:
    """W1's share of the coordinate losses at the end; empty if there is none."""
    share = w1_share(log)
    return "" if share is None else f"W1 is {percent(share)} of softCE + W1 at the end."


def counters_table(log: TrainingLog) -> str:
    """What channel B met: counters (`*_total`) summed over its steps, anything else it logged as its ends."""
    own = {"lr", "grad_norm", "tokens", "samples"}
    areas = ("loss/", "raw/", "coord_diag/", "coord_diag_a1/", "grad/", "time/")
    names = sorted(name for name in log.columns if name not in own and not name.startswith(areas))
    rows = []
    for name in names:
        if name.endswith("_total"):
            rows.append([f"`{name}`", f"{log.series(name)[1].sum():.0f}", "sum over steps"])
        elif (ends := log.ends(name)) is not None:
            rows.append([f"`{name}`", f"{significant(ends[0])} to {significant(ends[1])}", "first to last tenth"])
    return table(["logged by channel B", "value", "how"], rows, "lrl")
