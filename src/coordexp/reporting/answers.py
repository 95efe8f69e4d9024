"""Answers to the questions that every run is asked, and the experiments that follow from them; all by rule.

A rule reads metrics and logs, never a person's mind: the same numbers always give the same sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.config.paths import COMPARISONS
from coordexp.evaluation.effect import Verdict
from coordexp.reporting.inputs import Json, ReportData
from coordexp.reporting.markdown import number, percent, signed, table
from coordexp.reporting.tables import metric
from coordexp.reporting.verdicts import Difference, difference_from, verdict_of

W1_INERT = 0.01  # share of softCE + W1 below which W1 decides next to nothing
HEADROOM_WORTH = 0.03  # mAP that a better ranking could gain, from which a score is worth a study
DUPLICATES_WORTH = 0.02  # pairs per image more than the control, from which duplicates are a subject
PARSE_WORTH = 0.99
DRIFT_BINS = 1.1  # ratio of the bin errors of two contexts from which they are called apart
RECALL_GAP = 0.15


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One experiment: why, by which rule, and the command."""

    because: str
    rule: str
    command: str


def improved_and_flat(data: ReportData) -> list[str]:
    """For each comparison, which of the compared metrics rose, fell, and showed nothing."""
    lines = []
    for name, (new, old) in COMPARISONS.items():
        groups: dict[Verdict, list[str]] = {}
        for key, row in data.comparison[name].items():
            found = difference_from(row)
            shown = f"`{key}`"
            if found is not None and found.verdict in (Verdict.BETTER, Verdict.WORSE):
                shown += f" {signed(found.delta)} [{signed(found.lo)}, {signed(found.hi)}]"
            groups.setdefault(verdict_of(found), []).append(shown)
        words = {Verdict.BETTER: "improved", Verdict.WORSE: "fell", Verdict.NO_DIFFERENCE: "flat"}
        parts = [f"{word}: {', '.join(groups[verdict])}" for verdict, word in words.items() if verdict in groups]
        lines.append(f"**{new} against {old}**: {'; '.join(parts) or 'nothing is defined'}.")
    return lines


def standing_answers(data: ReportData, params: Mapping[str, Any]) -> str:
    """The standing questions with answer and evidence, as a table."""
    rows = [
        ["Does stage 2 beat the control?", *_beats_control(data)],
        ["Does W1 matter?", *_w1_matters(data, params)],
        ["Does the self-context (A2) drift from the ground-truth context (A1)?", *_drift(data, params)],
        ["Does the model see better on its own answers than before (channel B)?", *_channel_b(data)],
        ["Do duplicates grow?", *_duplicates(data)],
        ["Does the score rank well?", *_ranking(data)],
    ]
    return table(["question", "answer", "evidence"], rows, "lll")


def _main(data: ReportData) -> Difference | None:
    return difference_from(data.comparison["stage2_vs_control"]["coco.mAP"])


def _beats_control(data: ReportData) -> tuple[str, str]:
    found = _main(data)
    if found is None:
        return "not defined on this data", ""
    answer = {Verdict.BETTER: "yes", Verdict.WORSE: "no, it is worse"}.get(found.verdict, "not shown")
    reach = f"; could show {number(found.half_width)}" if found.verdict == Verdict.NO_DIFFERENCE else ""
    return f"**{answer}**", f"mAP {signed(found.delta)} [{signed(found.lo)}, {signed(found.hi)}]{reach}"


def w1_share(data: ReportData) -> float | None:
    """W1's share of softCE + W1 in the last tenth of stage 2; None where one of them is not trained."""
    ends = [data.logs["stage2"].ends(f"loss/{term}") for term in ("softce", "w1")]
    if ends[0] is None or ends[1] is None or not ends[0][1] + ends[1][1]:
        return None
    return ends[1][1] / (ends[0][1] + ends[1][1])


def _w1_matters(data: ReportData, params: Mapping[str, Any]) -> tuple[str, str]:
    share = w1_share(data)
    if share is None:
        return "**not in this run**", f"w1_weight {params['w1_weight']:g}, softce_weight {params['softce_weight']:g}"
    answer = "no, not at this weight" if share < W1_INERT else "it has a say; only an A/B test tells which"
    return f"**{answer}**", f"{percent(share)} of softCE + W1 at the end of stage 2, w1_weight {params['w1_weight']:g}"


def _drift(data: ReportData, params: Mapping[str, Any]) -> tuple[str, str]:
    if params["stage2"]["n_softctx_iter"] == 1:
        return "**it cannot**", "n_softctx_iter is 1: channel A is plain teacher forcing"
    ends = {name: _mae(data, name, channel) for name, channel in (("stage2", "A"), ("stage1-control", ""))}
    if None in ends.values():
        return "**not logged**", "no bin error of channel A or of the control"
    ratio = ends["stage2"] / ends["stage1-control"]
    answer = "yes" if ratio > DRIFT_BINS else "no"
    shown = f"{ends['stage2']:.1f} bins at the end of channel A, {ends['stage1-control']:.1f} of the control"
    return f"**{answer}**", f"{shown} (called apart from a ratio of {DRIFT_BINS:g})"


def _mae(data: ReportData, stage: str, channel: str) -> Any:
    log = data.logs[stage].of_channel(channel) if channel else data.logs[stage]
    ends = log.ends("coord_diag/expected_bin_mae")
    return None if ends is None else ends[1]


def _channel_b(data: ReportData) -> tuple[str, str]:
    ends = data.logs["stage2"].of_channel("B").ends("coord_diag/expected_bin_mae")
    if ends is None:
        return "**not in this run**", "no step of channel B"
    answer = "yes" if ends[1] < ends[0] / DRIFT_BINS else "no" if ends[1] > ends[0] * DRIFT_BINS else "about the same"
    return f"**{answer}**", f"error of E[k] under its own context {ends[0]:.1f} to {ends[1]:.1f} bins"


def _pairs(data: ReportData) -> dict[str, float]:
    key = min(name for name in data.metrics["stage2"]["set"] if name.startswith("dup_pairs_"))
    return {name: data.metrics[name]["set"][key] for name in ("stage1", "stage1-control", "stage2")}


def _duplicates(data: ReportData) -> tuple[str, str]:
    pairs = _pairs(data)
    more = pairs["stage2"] - pairs["stage1-control"]
    answer = "yes" if more >= DUPLICATES_WORTH else "no"
    values = ", ".join(f"{name} {number(value)}" for name, value in pairs.items())
    return f"**{answer}**", f"pairs per image: {values} (yes from {DUPLICATES_WORTH:g} above the control)"


def _ranking(data: ReportData) -> tuple[str, str]:
    headroom = metric(data.metrics, "stage2", "confidence.headroom_mAP")
    if headroom is None:
        return "not defined on this data", ""
    answer = "could be better" if headroom >= HEADROOM_WORTH else "yes"
    return f"**{answer}**", f"a perfect ranking of the same boxes would add {number(headroom)} mAP"


def suggestions(data: ReportData, params: Mapping[str, Any]) -> list[Suggestion]:
    """Experiments that the numbers ask for, most decisive first."""
    found = _main(data)
    of_stage2 = data.metrics["stage2"]
    return [
        *_on_the_difference(found),
        *_on_the_objective(data, params),
        *_on_the_answers(data, of_stage2, params),
    ]


def _on_the_difference(found: Difference | None) -> list[Suggestion]:
    if found is None or found.verdict == Verdict.BETTER:
        return []
    if found.verdict == Verdict.WORSE:
        rule, because = "stage 2 is worse than the control", "the loop costs more than it gives at these settings"
        return [Suggestion(because, rule, "coordexp ab -S stage2.b_ratio=0.0,0.25,0.5 --seeds 3")]
    because = f"differences below {number(found.half_width)} mAP are invisible to one seed and this many images"
    return [
        Suggestion(because, "no difference to the control shown", "coordexp ab -S stage2.b_ratio=0.0,0.5 --seeds 5")
    ]


def _on_the_objective(data: ReportData, params: Mapping[str, Any]) -> list[Suggestion]:
    made = []
    share = w1_share(data)
    if share is not None and share < W1_INERT:
        heavier = [f"{params['w1_weight'] * factor:g}" for factor in (1, 10, 100)]
        command = f"coordexp ab -S w1_weight={','.join(heavier)} --seeds 3"
        made.append(Suggestion(f"W1 is {percent(share)} of softCE + W1", f"share below {percent(W1_INERT)}", command))
    a, control = _mae(data, "stage2", "A"), _mae(data, "stage1-control", "")
    if a is not None and control is not None and a > control * DRIFT_BINS:
        because = f"channel A ends at {a:.1f} bins, the control at {control:.1f}: its coordinates forget"
        weight = params["softce_weight"]
        command = f"coordexp ab -S softce_weight={weight:g},{2 * weight:g} --seeds 3"
        made.append(Suggestion(because, f"ratio above {DRIFT_BINS:g}", command))
    return made


def _on_the_answers(data: ReportData, of_stage2: Json, params: Mapping[str, Any]) -> list[Suggestion]:
    made = []
    pairs = _pairs(data)
    if pairs["stage2"] - pairs["stage1-control"] >= DUPLICATES_WORTH:
        because = f"{number(pairs['stage2'])} duplicate pairs per image against {number(pairs['stage1-control'])}"
        made.append(Suggestion(because, "duplicates grow", "coordexp ab -S stage2.missed=append,sorted --seeds 3"))
    headroom = of_stage2["confidence"]["headroom_mAP"]
    if headroom is not None and headroom >= HEADROOM_WORTH:
        because = f"a perfect ranking would add {number(headroom)} mAP"
        made.append(Suggestion(because, f"headroom from {HEADROOM_WORTH:g}", "make decoding-study"))
    if of_stage2["parse"]["parse_rate"] < PARSE_WORTH and params["decode"]["grammar"] == "none":
        because = f"{percent(1 - of_stage2['parse']['parse_rate'])} of the answers do not parse whole"
        command = "coordexp ab -S decode.grammar=none,any --seeds 1"
        made.append(Suggestion(because, f"parse rate below {PARSE_WORTH:g}", command))
    small, large = of_stage2["coco"]["ARs"], of_stage2["coco"]["ARm"]
    if small is not None and large is not None and large - small >= RECALL_GAP:
        because = f"recall of small objects {number(small)}, of medium ones {number(large)}"
        command = "coordexp ab -S sigma=1.0,2.0 --seeds 3"
        made.append(Suggestion(because, f"gap from {RECALL_GAP:g}", command))
    return made


def suggestions_table(found: list[Suggestion]) -> str:
    """The suggestions as a table; says so where no rule fired."""
    if not found:
        return "No rule asks for an experiment."
    rows = [[s.because, s.rule, f"`{s.command}`"] for s in found]
    return table(["because", "rule", "experiment"], rows, "lll")
