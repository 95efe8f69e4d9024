"""Answers to the questions that every run is asked, and the experiments that follow from them; all by rule.

A rule reads metrics and logs, never a person's mind: the same numbers always give the same sentence. What is said of a
checkpoint rests on images that it was not trained on, with an interval; where there is none, it is "not shown".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtrit as student_quantile

from coordexp.config.paths import COMPARISONS
from coordexp.evaluation.bootstrap import resample_weights
from coordexp.evaluation.effect import LEVEL, Verdict, effect
from coordexp.evaluation.protocol import iou_key
from coordexp.reporting.inputs import TRAINED, ReportData, bounds_of, metric
from coordexp.reporting.markdown import interval, number, percent, table
from coordexp.reporting.training import of_channel, w1_fraction
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
        for key, found in compared(data, name).items():
            shown = f"`{key}`"
            if found is not None and found.verdict in (Verdict.BETTER, Verdict.WORSE):
                shown += f" {found}"
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


def standing_answers(data: ReportData) -> str:
    """The standing questions with answer and evidence, as a table; only what the data carry is answered."""
    rows = [
        ["Does stage 2 beat the control?", *_beats_control(data)],
        ["Does W1 matter?", *_w1_matters(data)],
        [
            "Does the self-context (A2) drift from the ground-truth context (A1)?",
            *drift_answer(of_channel(data.logs["stage2"], "A"), data.run.params.stage2.n_softctx_iter),
        ],
        ["Do duplicates grow?", *_duplicates(data)],
        ["Does the score rank well?", *_ranking(data)],
    ]
    return table(["question", "answer", "evidence"], rows, "lll")


def _main(data: ReportData) -> Difference | None:
    return compared(data, "stage2_vs_control")["coco.mAP"]


def _beats_control(data: ReportData) -> tuple[str, str]:
    found = _main(data)
    if found is None:
        return "not defined on this data", ""
    words = {Verdict.BETTER: "yes", Verdict.WORSE: "no, it is worse", Verdict.NOT_JUDGED: "not judged"}
    answer = words.get(found.verdict, "not shown")
    return f"**{answer}**", f"mAP {found}{_reach(found)}"


def _reach(found: Difference) -> str:
    return f"; could show {number(found.half_width)}" if found.verdict == Verdict.NO_DIFFERENCE else ""


def _w1_matters(data: ReportData) -> tuple[str, str]:
    """A share of the loss is no effect on boxes, so it answers nothing beyond whether there is a term at all."""
    params, share = data.run.params, w1_fraction(data.logs["stage2"])
    if share is None:
        return "**not in this run**", f"w1_weight {params.w1_weight:g}, softce_weight {params.softce_weight:g}"
    evidence = f"{percent(share)} of softCE + W1 at the end of stage 2, w1_weight {params.w1_weight:g}"
    return "**not shown**", f"{evidence}; only an A/B test over the weight tells"


def context_drift(log: pd.DataFrame) -> pd.DataFrame:
    """Mean error of E[k] in bins at `first` (A1) and `last` (A2), of the steps of channel A that log both contexts.

    A1 reads the annotated coordinates, the last forward its own: on the same slots, so the difference is paired and
    needs no other model or data.
    """
    columns = {"coord_diag_a1/expected_bin_mae": "first", "coord_diag/expected_bin_mae": "last"}
    return log.reindex(columns=list(columns)).rename(columns=columns).dropna()


def drift_answer(log: pd.DataFrame, n_forwards: int) -> tuple[str, str]:
    """Answer and evidence on the drift of A2 from A1; the steps hold equally many samples and count alike."""
    if n_forwards == 1:
        return "**none to measure**", "n_softctx_iter is 1: channel A is one forward, in the ground-truth context"
    both = context_drift(log)
    if both.empty:
        return "**not shown**", "no step logs the first forward beside the last"
    errors = f"error of E[k] {both['first'].mean():.1f} bins at A1, {both['last'].mean():.1f} at A2"
    n, more = len(both), both["last"] - both["first"]
    if n == 1:
        return "**not shown**", f"{errors}, in one step"
    delta, half_width = more.mean(), student_quantile(n - 1, 1 - LEVEL / 2) * more.sem()
    lo, hi = delta - half_width, delta + half_width
    answer = "yes" if lo > 0 else "no, A2 is nearer" if hi < 0 else "not shown"
    bounds = f"{delta:+.1f} [{lo:+.1f}, {hi:+.1f}]"
    return f"**{answer}**", f"{errors}, paired {bounds} (95 % t interval over {n} training steps)"


def more_duplicates(data: ReportData) -> Difference | None:
    """Duplicate pairs per image, stage 2 minus the control, paired over the images; here `better` means more of them.

    Resampled as the metrics are, with the seed and number of resamples of the evaluation.
    """
    more_I = (_pairs_I(data, "stage2") - _pairs_I(data, "stage1-control")).to_numpy(np.float64)
    params = data.run.params
    weights_BI = resample_weights(len(more_I), params.eval.bootstrap_resamples, params.seed)
    found = effect(np.array([more_I.mean()]), (weights_BI @ more_I / len(more_I))[np.newaxis])
    return difference_from(None if found is None else asdict(found))


def _pairs_I(data: ReportData, checkpoint: str) -> pd.Series:
    """Duplicate pairs of each image, by image id."""
    return data.per_image[checkpoint][f"dup_pairs_{iou_key(min(data.settings.duplicate_ious))}"]


def _duplicates(data: ReportData) -> tuple[str, str]:
    found = more_duplicates(data)
    if found is None:
        return "not defined on this data", ""
    answer = {Verdict.BETTER: "yes", Verdict.WORSE: "no, they shrink"}.get(found.verdict, "not shown")
    means = ", ".join(f"{name} {number(float(_pairs_I(data, name).mean()))}" for name in TRAINED)
    return f"**{answer}**", f"pairs per image: {means}; stage2 - stage1-control {found}{_reach(found)}"


def _ranking(data: ReportData) -> tuple[str, str]:
    """Whether the interval of what a perfect ranking would add lies on one side of HEADROOM_WORTH."""
    headroom = metric(data.metrics, "stage2", "confidence.headroom_mAP")
    bounds = bounds_of(data.metrics, "stage2", "confidence.headroom_mAP")
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


def suggestions(data: ReportData) -> list[Suggestion]:
    """Experiments that the numbers ask for, most decisive first."""
    return [
        *_on_the_difference(_main(data)),
        *_on_the_objective(data),
        *_on_the_answers(data),
    ]


def _on_the_difference(found: Difference | None) -> list[Suggestion]:
    if found is None or found.verdict not in (Verdict.WORSE, Verdict.NO_DIFFERENCE):
        return []
    if found.verdict == Verdict.WORSE:
        rule, because = "stage 2 is worse than the control", f"mAP {found} against the control, with one seed"
        return [Suggestion(because, rule, "coordexp ab -S stage2.b_ratio=0.0,0.25,0.5 --seeds 3")]
    because = f"differences below {number(found.half_width)} mAP are invisible to one seed and this many images"
    return [
        Suggestion(because, "no difference to the control shown", "coordexp ab -S stage2.b_ratio=0.0,0.5 --seeds 5")
    ]


def _on_the_objective(data: ReportData) -> list[Suggestion]:
    share = w1_fraction(data.logs["stage2"])
    if share is None or share >= W1_INERT:
        return []
    heavier = [f"{data.run.params.w1_weight * factor:g}" for factor in (1, 10, 100)]
    command = f"coordexp ab -S w1_weight={','.join(heavier)} --seeds 3"
    return [Suggestion(f"W1 is {percent(share)} of softCE + W1", f"share below {percent(W1_INERT)}", command)]


def _on_the_answers(data: ReportData) -> list[Suggestion]:
    made = []
    duplicates = more_duplicates(data)
    if duplicates is not None and duplicates.verdict == Verdict.BETTER:
        because = f"{duplicates} duplicate pairs per image against the control"
        made.append(Suggestion(because, "duplicates grow", "coordexp ab -S stage2.missed=append,sorted --seeds 3"))
    bounds = bounds_of(data.metrics, "stage2", "confidence.headroom_mAP")
    if bounds is not None and bounds[0] >= HEADROOM_WORTH:
        because = f"a perfect ranking would add {interval(bounds)} mAP"
        made.append(Suggestion(because, f"headroom from {HEADROOM_WORTH:g}", "make decoding-study"))
    rate = metric(data.metrics, "stage2", "parse.parse_rate")
    if rate < PARSE_WORTH and data.run.params.decode.grammar == "none":
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
