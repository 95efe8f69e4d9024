"""Answers to the questions that every run is asked, and the experiments that follow from them; all by rule.

A rule reads metrics and logs, never a person's mind: the same numbers always give the same sentence. What is said of a
checkpoint rests on images that it was not trained on, with an interval; where there is none, it is "not shown".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coordexp.config.paths import COMPARISONS
from coordexp.evaluation.bootstrap import resample_weights
from coordexp.evaluation.effect import Verdict, effect
from coordexp.evaluation.table import Floats
from coordexp.reporting.context_drift import drift_answer
from coordexp.reporting.inputs import TRAINED, ReportData, metric
from coordexp.reporting.markdown import interval, number, percent, signed, table
from coordexp.reporting.training_tables import w1_share
from coordexp.reporting.verdicts import Difference, checkpoint_faults, compared, difference_from, verdict_of

W1_INERT = 0.01  # share of softCE + W1 below which a heavier W1 is worth a test
HEADROOM_WORTH = 0.03  # mAP that a better ranking could gain, from which a score is worth a study
RANKABLE_MAP = 0.1  # under a perfect ranking; below it a small headroom says nothing about the score
PARSE_WORTH = 0.99


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One experiment: why, by which rule, and the command."""

    because: str
    rule: str
    command: str


def improved_and_flat(data: ReportData) -> list[str]:
    """For each comparison, which of the compared metrics rose, which fell, and which show no difference."""
    lines = []
    for name, (new, old) in COMPARISONS.items():
        groups: dict[Verdict, list[str]] = {}
        for key, found in compared(data.metrics, data.comparison, name).items():
            shown = f"`{key}`"
            if found is not None and found.verdict in (Verdict.BETTER, Verdict.WORSE):
                shown += f" {signed(found.delta)} [{signed(found.lo)}, {signed(found.hi)}]"
            groups.setdefault(verdict_of(found), []).append(shown)
        parts = [f"{word}: {', '.join(groups[verdict])}" for verdict, word in _MOVES.items() if verdict in groups]
        lines.append(f"**{new} against {old}**: {'; '.join(parts) or 'nothing is defined'}.")
    return lines


_MOVES = {
    Verdict.BETTER: "improved",
    Verdict.WORSE: "fell",
    Verdict.NO_DIFFERENCE: "no difference shown",
    Verdict.NOT_JUDGED: "not judged",
}


def standing_answers(data: ReportData, params: Mapping[str, Any]) -> str:
    """The standing questions with answer and evidence, as a table; only what the data carry is answered."""
    rows = [
        ["Does stage 2 beat the control?", *_beats_control(data)],
        ["Does W1 matter?", *_w1_matters(data, params)],
        [
            "Does the self-context (A2) drift from the ground-truth context (A1)?",
            *drift_answer(data.logs["stage2"].of_channel("A"), params),
        ],
        ["Do duplicates grow?", *_duplicates(data, params)],
        ["Does the score rank well?", *_ranking(data)],
    ]
    return table(["question", "answer", "evidence"], rows, "lll")


def _main(data: ReportData) -> Difference | None:
    return compared(data.metrics, data.comparison, "stage2_vs_control")["coco.mAP"]


def _beats_control(data: ReportData) -> tuple[str, str]:
    found = _main(data)
    if found is None:
        return "not defined on this data", ""
    words = {Verdict.BETTER: "yes", Verdict.WORSE: "no, it is worse", Verdict.NOT_JUDGED: "not judged"}
    answer = words.get(found.verdict, "not shown")
    return f"**{answer}**", f"mAP {_bounds(found)}{_reach(found)}"


def _bounds(found: Difference) -> str:
    return f"{signed(found.delta)} [{signed(found.lo)}, {signed(found.hi)}]"


def _reach(found: Difference) -> str:
    return f"; could show {number(found.half_width)}" if found.verdict == Verdict.NO_DIFFERENCE else ""


def _w1_matters(data: ReportData, params: Mapping[str, Any]) -> tuple[str, str]:
    """A share of the loss is no effect on boxes, so it answers nothing beyond whether there is a term at all."""
    share = w1_share(data.logs["stage2"])
    if share is None:
        return "**not in this run**", f"w1_weight {params['w1_weight']:g}, softce_weight {params['softce_weight']:g}"
    evidence = f"{percent(share)} of softCE + W1 at the end of stage 2, w1_weight {params['w1_weight']:g}"
    return "**not shown**", f"{evidence}; only an A/B test over the weight tells"


def more_duplicates(data: ReportData, params: Mapping[str, Any]) -> Difference | None:
    """Duplicate pairs per image, stage 2 minus the control, paired over the images; here `better` means more of them.

    Resampled as the metrics are, with the seed and number of resamples of the evaluation.
    """
    more_I = _pairs_I(data, "stage2") - _pairs_I(data, "stage1-control")
    weights_BI = resample_weights(len(more_I), params["eval"]["bootstrap_resamples"], params["seed"])
    found = effect(np.array([more_I.mean()]), (weights_BI @ more_I / len(more_I))[np.newaxis])
    return difference_from(None if found is None else asdict(found))


def _pairs_I(data: ReportData, checkpoint: str) -> Floats:
    """Duplicate pairs of each image, by image id."""
    rows = sorted(data.per_image[checkpoint], key=lambda row: int(row["image_id"]))
    key = min(name for name in rows[0] if name.startswith("dup_pairs_"))
    return np.array([row[key] for row in rows], dtype=np.float64)


def _duplicates(data: ReportData, params: Mapping[str, Any]) -> tuple[str, str]:
    found = more_duplicates(data, params)
    if found is None:
        return "not defined on this data", ""
    answer = {Verdict.BETTER: "yes", Verdict.WORSE: "no, they shrink"}.get(found.verdict, "not shown")
    means = ", ".join(f"{name} {number(float(_pairs_I(data, name).mean()))}" for name in TRAINED)
    return f"**{answer}**", f"pairs per image: {means}; stage2 - stage1-control {_bounds(found)}{_reach(found)}"


def _ranking(data: ReportData) -> tuple[str, str]:
    """Whether the interval of what a perfect ranking would add lies on one side of HEADROOM_WORTH."""
    headroom = metric(data.metrics, "stage2", "confidence.headroom_mAP")
    bounds = data.metrics["stage2"]["interval"].get("confidence.headroom_mAP")
    if headroom is None or bounds is None:
        return "not defined on this data", ""
    perfect = metric(data.metrics, "stage2", "confidence.perfect_ranking_mAP")
    evidence = f"a perfect ranking of the same boxes would add {number(headroom)} {interval(bounds)} mAP"
    if checkpoint_faults(data.metrics, "stage2"):
        return "**not judged**", evidence
    if bounds[0] >= HEADROOM_WORTH:
        return "**could be better**", evidence
    if perfect < RANKABLE_MAP:
        return "**not shown**", f"{evidence}, and reach {number(perfect)}: there is too little to rank"
    return ("**yes**" if bounds[1] < HEADROOM_WORTH else "**not shown**"), f"{evidence}; worth it: {HEADROOM_WORTH:g}"


def suggestions(data: ReportData, params: Mapping[str, Any]) -> list[Suggestion]:
    """Experiments that the numbers ask for, most decisive first."""
    return [
        *_on_the_difference(_main(data)),
        *_on_the_objective(data, params),
        *_on_the_answers(data, params),
    ]


def _on_the_difference(found: Difference | None) -> list[Suggestion]:
    if found is None or found.verdict not in (Verdict.WORSE, Verdict.NO_DIFFERENCE):
        return []
    if found.verdict == Verdict.WORSE:
        rule, because = "stage 2 is worse than the control", f"mAP {_bounds(found)} against the control, with one seed"
        return [Suggestion(because, rule, "coordexp ab -S stage2.b_ratio=0.0,0.25,0.5 --seeds 3")]
    because = f"differences below {number(found.half_width)} mAP are invisible to one seed and this many images"
    return [
        Suggestion(because, "no difference to the control shown", "coordexp ab -S stage2.b_ratio=0.0,0.5 --seeds 5")
    ]


def _on_the_objective(data: ReportData, params: Mapping[str, Any]) -> list[Suggestion]:
    share = w1_share(data.logs["stage2"])
    if share is None or share >= W1_INERT:
        return []
    heavier = [f"{params['w1_weight'] * factor:g}" for factor in (1, 10, 100)]
    command = f"coordexp ab -S w1_weight={','.join(heavier)} --seeds 3"
    return [Suggestion(f"W1 is {percent(share)} of softCE + W1", f"share below {percent(W1_INERT)}", command)]


def _on_the_answers(data: ReportData, params: Mapping[str, Any]) -> list[Suggestion]:
    made = []
    duplicates = more_duplicates(data, params)
    if duplicates is not None and duplicates.verdict == Verdict.BETTER:
        because = f"{_bounds(duplicates)} duplicate pairs per image against the control"
        made.append(Suggestion(because, "duplicates grow", "coordexp ab -S stage2.missed=append,sorted --seeds 3"))
    bounds = data.metrics["stage2"]["interval"].get("confidence.headroom_mAP")
    if bounds is not None and bounds[0] >= HEADROOM_WORTH:
        because = f"a perfect ranking would add {interval(bounds)} mAP"
        made.append(Suggestion(because, f"headroom from {HEADROOM_WORTH:g}", "make decoding-study"))
    rate = metric(data.metrics, "stage2", "parse.parse_rate")
    if rate < PARSE_WORTH and params["decode"]["grammar"] == "none":
        because = f"{percent(1 - rate)} of the answers do not parse whole"
        command = "coordexp ab -S decode.grammar=none,any --seeds 1"
        made.append(Suggestion(because, f"parse rate below {PARSE_WORTH:g}", command))
    return made


def suggestions_table(found: list[Suggestion]) -> str:
    """The suggestions as a table; says so where no rule fired."""
    if not found:
        return "No rule asks for an experiment."
    rows = [[s.because, s.rule, f"`{s.command}`"] for s in found]
    return table(["because", "rule", "experiment"], rows, "lll")
