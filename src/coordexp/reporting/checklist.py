"""The verification checklist: claims that a reader would otherwise take on trust, each with its evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd

from coordexp.config.paths import CHECKPOINTS
from coordexp.evaluation.effect import Verdict
from coordexp.infra.logs import ends
from coordexp.reporting.inputs import TRAINED, ReportData, metric, required
from coordexp.reporting.markdown import number, percent, table
from coordexp.reporting.outcomes import MATCH_IOU, Outcomes
from coordexp.reporting.training import target_entropy_nats
from coordexp.reporting.verdicts import compared

PARSE_RATE = 0.99
COORD_MASS = 0.95
CONTROL_FRACTION = 0.9  # of the tokens of stage 2, the minimum that the control must have trained on
BOUND_TOLERANCE = 0.05  # the border truncates the target, so its entropy is slightly lower there


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the checklist; `passed` is None if the files do not determine it."""

    claim: str
    passed: bool | None
    evidence: str

    @property
    def mark(self) -> str:
        """✔, ✘, or ? if the files do not determine it."""
        return "?" if self.passed is None else "✔" if self.passed else "✘"


OutcomesBy = Mapping[str, Outcomes]


def run_checks(data: ReportData, outcomes: OutcomesBy) -> list[Check]:
    """All lines of the checklist, in reading order."""
    rules: tuple[Callable[[ReportData, OutcomesBy], Check], ...] = (
        _same_images,
        _counts_agree,
        _one_decode,
        _answers_parse,
        _answers_hold_objects,
        _coordinate_mass_holds,
        _logs_are_whole,
        _softce_above_floor,
        _schedule_realised,
        _control_is_fair,
        _below_upper_bound,
        _stage1_learned,
        _stage2_not_worse,
    )
    return [rule(data, outcomes) for rule in rules]


def checklist_table(checks: list[Check]) -> str:
    """The checklist as a table."""
    return table(["", "claim", "evidence"], [[c.mark, c.claim, c.evidence] for c in checks], "lll")


def _same_images(_data: ReportData, outcomes: OutcomesBy) -> Check:
    tables = [outcomes[name].table for name in CHECKPOINTS]
    first = tables[0]
    same = all(
        np.array_equal(t.image_ids_I, first.image_ids_I) and np.array_equal(t.gt_boxes_G4, first.gt_boxes_G4)
        for t in tables
    )
    evidence = f"{first.n_images} images, {int(first.n_gt_I.sum())} objects in each predictions file"
    return Check("All checkpoints answered the same images", same, evidence if same else "images or annotations differ")


def _counts_agree(data: ReportData, outcomes: OutcomesBy) -> Check:
    keys = ("f1.tp_50", "f1.fp_50", "f1.fn_50")
    differing = []
    for name in CHECKPOINTS:
        counted = outcomes[name].matches.counts(MATCH_IOU, "full").sum(axis=0).tolist()
        if counted != [metric(data.metrics, name, key) for key in keys]:
            differing.append(f"{name}: {counted}")
    agreed = "true positives, false positives and false negatives recounted from gt_vs_pred.jsonl"
    evidence = f"recounted differently: {'; '.join(differing)}" if differing else agreed
    return Check("The counts in metrics.json agree with the predictions files", not differing, evidence)


def _one_decode(data: ReportData, _outcomes: OutcomesBy) -> Check:
    # The base model answers with digits, another codec, so its identity differs by design.
    found = {row.identity.get("decode") for name in TRAINED for row in data.results[name]}
    known = sorted(value for value in found if value is not None)
    evidence = f"decode identity {', '.join(known)}" if known else "the predictions files have no decode identity"
    claim = "The trained checkpoints were decoded with the same settings"
    return Check(claim, len(found) == 1 if known else None, evidence)


def _answers_parse(data: ReportData, _outcomes: OutcomesBy) -> Check:
    rates = {name: metric(data.metrics, name, "parse.parse_rate") for name in TRAINED}
    evidence = ", ".join(f"{name} {number(rate)}" for name, rate in rates.items())
    claim = f"At least {percent(PARSE_RATE)} of the answers parse completely"
    return Check(claim, min(rates.values()) >= PARSE_RATE, evidence)


def _answers_hold_objects(data: ReportData, _outcomes: OutcomesBy) -> Check:
    found = {name: metric(data.metrics, name, "coco.n_pred") or 0 for name in CHECKPOINTS}
    evidence = ", ".join(f"{name} {count:,.0f} boxes" for name, count in found.items())
    return Check("Every checkpoint predicts at least one box", min(found.values()) > 0, evidence)


def _coordinate_mass_holds(data: ReportData, _outcomes: OutcomesBy) -> Check:
    claim = f"In training, coordinate tokens have at least {percent(COORD_MASS)} of the probability at coordinate slots"
    found = {name: ends(data.logs[name], "coord_diag/coord_vocab_mass_mean") for name in TRAINED}
    masses = {name: values[1] for name, values in found.items() if values}
    if not masses:
        return Check(claim, None, "not logged")
    evidence = ", ".join(f"{name} {number(mass)} at the end" for name, mass in masses.items())
    return Check(claim, min(masses.values()) >= COORD_MASS, evidence)


def _logs_are_whole(data: ReportData, _outcomes: OutcomesBy) -> Check:
    broken = [name for name in TRAINED if not _is_whole(data.logs[name])]
    steps = ", ".join(f"{name} {len(data.logs[name])} steps" for name in TRAINED)
    evidence = f"{steps}; broken: {', '.join(broken)}" if broken else steps
    return Check("Every step is logged once, with a finite loss", not broken, evidence)


def _is_whole(log: pd.DataFrame) -> bool:
    in_order = np.array_equal(log.index, np.arange(len(log)))
    return in_order and bool(np.isfinite(log["loss/total"]).all())


def _softce_above_floor(data: ReportData, _outcomes: OutcomesBy) -> Check:
    params = data.run.params
    entropy = target_entropy_nats(params.target, params.sigma, params.truncate)
    claim = "softCE minus KL equals the entropy of the target: loss and target agree"
    measured = {}
    for name in TRAINED:
        softce, kl = ends(data.logs[name], "raw/softce"), ends(data.logs[name], "coord_diag/softce_kl")
        if softce and kl:
            measured[name] = softce[1] - kl[1]
    if not measured:
        return Check(claim, None, "softCE is not trained")
    evidence = ", ".join(f"{name} {value:.3f}" for name, value in measured.items()) + f"; entropy {entropy:.3f}"
    return Check(claim, all(abs(value / entropy - 1) <= BOUND_TOLERANCE for value in measured.values()), evidence)


def _schedule_realised(data: ReportData, _outcomes: OutcomesBy) -> Check:
    log = data.logs["stage2"]
    wanted = math.floor(len(log) * Fraction(str(data.run.params.stage2.b_ratio)))
    found = int((log["channel"] == "B").sum())
    evidence = f"{found} of {len(log)} steps, planned {wanted}"
    return Check("Channel B had its fraction of the steps", found == wanted, evidence)


def _control_is_fair(data: ReportData, _outcomes: OutcomesBy) -> Check:
    control, stage2 = (
        required(data.metadata[name], "tokens", f"{name}/run_metadata.json") for name in ("stage1-control", "stage2")
    )
    fraction = control / stage2
    evidence = f"{control:,} tokens against {stage2:,} ({percent(fraction)})"
    claim = f"The control trained on at least {percent(CONTROL_FRACTION)} of the tokens of stage 2"
    return Check(claim, fraction >= CONTROL_FRACTION, evidence)


def _below_upper_bound(data: ReportData, _outcomes: OutcomesBy) -> Check:
    claim = "No checkpoint exceeds the upper bound of the codec"
    upper_bound = required(data.upper_bound, "mAP", "upper_bound.json")
    if upper_bound is None:
        return Check(claim, None, "the data have no annotated object")
    best = max(metric(data.metrics, name, "coco.mAP") or 0.0 for name in CHECKPOINTS)
    evidence = f"best mAP {number(best)}, upper bound {number(upper_bound)}"
    return Check(claim, best <= upper_bound, evidence)


def _stage1_learned(data: ReportData, _outcomes: OutcomesBy) -> Check:
    claim = "Stage 1 is better than the base model (AP50)"
    return _compared(data, claim, "stage1_vs_base", "coco.AP50", {Verdict.BETTER})


def _stage2_not_worse(data: ReportData, _outcomes: OutcomesBy) -> Check:
    allowed = {Verdict.BETTER, Verdict.NO_DIFFERENCE}
    claim = "Stage 2 is not shown to be worse than stage 1 (mAP)"
    return _compared(data, claim, "stage2_vs_stage1", "coco.mAP", allowed)


def _compared(data: ReportData, claim: str, comparison: str, key: str, allowed: set[Verdict]) -> Check:
    difference = compared(data, comparison)[key]
    if difference is None:
        return Check(claim, None, "not defined on this data")
    verdict = difference.verdict
    passed = None if verdict == Verdict.NOT_JUDGED else verdict in allowed
    return Check(claim, passed, f"{difference}: {verdict.value}")
