"""Answers to the standing questions of every run, and the experiments that follow from them; all by rule.

Rules read metrics and held-out readings: the same numbers always give the same sentence. A statement about a checkpoint
rests on images that it was not trained on, with an interval; where the interval does not support an answer, the answer
is "not shown". A training log answers no question: its images and weights change from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from coordexp.config.paths import COMPARISONS
from coordexp.evaluation.bootstrap import interval, resample_weights
from coordexp.evaluation.effect import Verdict, effect
from coordexp.evaluation.protocol import iou_key
from coordexp.evaluation.table import Floats, Ints
from coordexp.infra.logs import diagnostic_sums
from coordexp.reporting.inputs import TRAINED, Json, ReportData, bounds_of, metric
from coordexp.reporting.markdown import MISSING, number, percent, table, with_interval
from coordexp.reporting.training import MEANINGS, OTHER_UNITS, SHAPES, w1_fraction
from coordexp.reporting.verdicts import Difference, checkpoint_faults, compared, difference_from, verdict_of

W1_INERT = 0.01  # fraction of softCE + W1 below which a larger weight of W1 is worth a test
HEADROOM_WORTH = 0.03  # mAP that a better ranking could gain, from which the score is worth a study
RANKABLE_MAP = 0.1  # under a perfect ranking; below it a small headroom is no evidence about the score
PARSE_WORTH = 0.99
MIN_IMAGES = 8  # with objects to compare; resamples of fewer are nearly all alike, whatever the truth
OWN, FIRST = "own", "A1"
NOT_SHOWN, NOT_EVALUATED = "not shown", "not evaluated"
UNDEFINED = ("not defined on this data", "")


@dataclass(frozen=True, slots=True)
class Answer:
    """A standing question, its answer in a few words, and the evidence."""

    question: str
    answer: str
    evidence: str

    @property
    def shown(self) -> bool:
        """Whether the data support an answer."""
        return self.answer not in (NOT_SHOWN, UNDEFINED[0], NOT_EVALUATED)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One experiment: the reason, the rule, the command, and what it will show."""

    because: str
    rule: str
    command: str
    learn: str


def improved_and_flat(data: ReportData) -> list[str]:
    """For each comparison, the metrics that rose, that fell, and that show no difference."""
    lines = []
    for name, (new, old) in COMPARISONS.items():
        groups: dict[Verdict, list[str]] = {}
        for key, found in compared(data, name).items():
            shown = f"`{key}`"
            if found is not None and found.verdict in (Verdict.BETTER, Verdict.WORSE):
                shown += f" {found}"
            groups.setdefault(verdict_of(found), []).append(shown)
        parts = [f"{word}: {', '.join(groups[verdict])}" for verdict, word in _MOVES.items() if verdict in groups]
        lines.append(f"**{new} against {old}**: {'; '.join(parts) or 'no metric is defined'}.")
    return lines


_MOVES = {
    Verdict.BETTER: "improved",
    Verdict.WORSE: "fell",
    Verdict.NO_DIFFERENCE: "no difference shown",
    Verdict.NOT_JUDGED: NOT_EVALUATED,
}


def standing_answers(data: ReportData) -> list[Answer]:
    """The standing questions, answered only where held-out data support it."""
    questions: dict[str, Callable[[ReportData], tuple[str, str]]] = {
        "Does stage 2 beat the control?": _beats_control,
        "Does the self-context (A2) drift from the annotated context (A1)?": _drift,
        "Does stage 2 have larger errors in its own answers than in annotated ones?": _exposure,
        "Does stage 2 have smaller errors in its own answers than the control?": _own_answers,
        "Does stage 2 forget coordinates that stage 1 knew?": _forgets_coordinates,
        "Does stage 2 forget text that stage 1 knew?": _forgets_text,
        "Does W1 have an effect?": _w1_matters,
        "Do duplicates increase?": _duplicates,
        "Does the score rank well?": _ranking,
    }
    return [Answer(question, *rule(data)) for question, rule in questions.items()]


def answers_table(answers: Sequence[Answer]) -> str:
    """Question, answer and evidence."""
    rows = [[a.question, f"**{a.answer}**", a.evidence] for a in answers]
    return table(["question", "answer", "evidence"], rows, "lll")


def _main(data: ReportData) -> Difference | None:
    return compared(data, "stage2_vs_control")["coco.mAP"]


def _beats_control(data: ReportData) -> tuple[str, str]:
    found = _main(data)
    if found is None:
        return UNDEFINED
    words = {Verdict.BETTER: "yes", Verdict.WORSE: "no, it is worse", Verdict.NOT_JUDGED: NOT_EVALUATED}
    return words.get(found.verdict, NOT_SHOWN), f"mAP {found}{_reach(found)}"


def _reach(found: Difference) -> str:
    return f"; minimum detectable difference {found.reach}" if found.verdict == Verdict.NO_DIFFERENCE else ""


# Held-out readings: errors of the eval callback on the same dev images at the end of each stage.


def last_reading(data: ReportData, stage: str) -> dict[int, Json]:
    """The rows of a stage's last evaluation by image; empty if there are none."""
    rows = data.contexts[stage] or ()
    last = max((row["step"] for row in rows), default=None)
    return {row["image_id"]: row for row in rows if row["step"] == last}


def _reading_weights(data: ReportData, n_images: int) -> Ints:
    return resample_weights(n_images, data.run.params.eval.bootstrap_resamples, data.run.params.seed)


def _ratio(sums_I: Floats, counts_I: Floats, weights_BI: Ints) -> tuple[float | None, Floats]:
    """Ratio of sums over the images and over each resample (B,); NaN where the denominator is 0."""
    sums_B, counts_B = weights_BI @ sums_I, weights_BI @ counts_I
    resampled = np.divide(sums_B, counts_B, out=np.full(len(sums_B), np.nan), where=counts_B > 0)
    return float(sums_I.sum() / counts_I.sum()) if counts_I.sum() else None, resampled


def reading_mean(data: ReportData, rows: Sequence[Json], context: str) -> tuple[float | None, list[float] | None]:
    """Mean error in bins over the objects of some rows in one context, with its interval over images."""
    known = [[e for e in row.get(context, ()) if e is not None] for row in rows]
    sums_I, counts_I = (np.array([f(k) for k in known], np.float64) for f in (sum, len))
    mean, resampled = _ratio(sums_I, counts_I, _reading_weights(data, len(rows)))
    return mean, interval(resampled, mean, is_share=False)


def reading_difference(data: ReportData, new: tuple[str, str], old: tuple[str, str]) -> Difference | None:
    """Mean error in bins of (stage, context) minus another, objects known in both; `better` is a larger error.

    Paired by object, resampled by image with the seed and number of the evaluation; None if no object is in both.
    """
    (new_stage, new_context), (old_stage, old_context) = new, old
    new_rows, old_rows = last_reading(data, new_stage), last_reading(data, old_stage)
    differences = [
        [
            a - b
            for a, b in zip(new_rows[i].get(new_context, ()), old_rows[i].get(old_context, ()), strict=False)
            if a is not None and b is not None
        ]
        for i in sorted(new_rows.keys() & old_rows.keys())
    ]
    return _difference(data, [sum(d) for d in differences], [len(d) for d in differences])


def text_difference(data: ReportData) -> Difference | None:
    """Nats per token of annotated text, stage 2 minus stage 1, on the same images; `better` means more nats."""
    new, old = (last_reading(data, stage) for stage in ("stage2", "stage1"))
    shared = sorted(new.keys() & old.keys())
    return _difference(
        data, [new[i]["text_ce"] - old[i]["text_ce"] for i in shared], [new[i]["text_tokens"] for i in shared]
    )


def _difference(data: ReportData, sums_I: Sequence[float], counts_I: Sequence[float]) -> Difference | None:
    if not sum(counts_I):
        return None
    weights_BI = _reading_weights(data, len(sums_I))
    delta, resampled = _ratio(np.array(sums_I, np.float64), np.array(counts_I, np.float64), weights_BI)
    found = effect(np.array([delta]), resampled[np.newaxis])
    return difference_from(None if found is None else asdict(found))


def _read(data: ReportData, new: tuple[str, str], old: tuple[str, str], larger: str, smaller: str) -> tuple[str, str]:
    """The answer that follows from a difference of errors, and its evidence."""
    found = reading_difference(data, new, old)
    if found is None:
        return NOT_SHOWN, _no_reading(data, (new, old))
    named = " - ".join(f"{stage} {context}" for stage, context in (new, old))
    evidence = f"error in bins, {named}, objects in both: {found}{_reach(found)}"
    return _worded(data, new[0], found, {Verdict.BETTER: larger, Verdict.WORSE: smaller}, evidence)


def _worded(
    data: ReportData, stage: str, found: Difference, words: Mapping[Verdict, str], evidence: str
) -> tuple[str, str]:
    """The word for a difference of readings, unless there are too few images."""
    images = len(last_reading(data, stage))
    enough = images >= MIN_IMAGES
    few = "" if enough else f", fewer than the {MIN_IMAGES} that an interval needs"
    return (words.get(found.verdict, NOT_SHOWN) if enough else NOT_SHOWN), f"{images} dev images{few}: {evidence}"


def _no_reading(data: ReportData, asked: Sequence[tuple[str, str]]) -> str:
    without = [stage for stage in dict.fromkeys(stage for stage, _ in asked) if not last_reading(data, stage)]
    if without:
        return f"no dev image was read at the end of {', '.join(without)} (`monitor.every_steps`)"
    return "no object was read in both contexts"


def _drift(data: ReportData) -> tuple[str, str]:
    n_forwards = data.run.params.stage2.n_softctx_iter
    if n_forwards == 1:
        return "not applicable", "n_softctx_iter is 1: channel A is one forward, in the annotated context"
    return _read(data, ("stage2", f"A{n_forwards}"), ("stage2", FIRST), "yes", "no, A2 has smaller errors")


def _exposure(data: ReportData) -> tuple[str, str]:
    return _read(data, ("stage2", OWN), ("stage2", FIRST), "yes", "no, smaller errors")


def _own_answers(data: ReportData) -> tuple[str, str]:
    return _read(data, ("stage2", OWN), ("stage1-control", OWN), "no, larger errors", "yes")


def _forgets_coordinates(data: ReportData) -> tuple[str, str]:
    return _read(data, ("stage2", FIRST), ("stage1", FIRST), "yes", "no, smaller errors")


def _forgets_text(data: ReportData) -> tuple[str, str]:
    found = text_difference(data)
    if found is None:
        return NOT_SHOWN, _no_reading(data, (("stage2", FIRST), ("stage1", FIRST)))
    words = {Verdict.BETTER: "yes", Verdict.WORSE: "no, it is more probable"}
    return _worded(data, "stage2", found, words, f"nats per token of annotated text, stage2 - stage1: {found}")


def readings_table(data: ReportData) -> str:
    """Mean error by context with its interval, a row for each stage and evaluation; empty if there was none."""
    by_step = {
        (stage, step): [row for row in data.contexts[stage] or () if row["step"] == step]
        for stage in TRAINED
        for step in sorted({row["step"] for row in data.contexts[stage] or ()})
    }
    names = dict.fromkeys(key for rows in by_step.values() for key, value in rows[0].items() if isinstance(value, list))
    rows = [
        [
            *(stage, str(step), str(len(found)), str(sum(len(row[FIRST]) for row in found))),
            *(with_interval(*reading_mean(data, found, name)) for name in names),
            str(sum(e is not None for row in found for e in row[OWN])),
            _nats(found),
        ]
        for (stage, step), found in by_step.items()
    ]
    header = ["read after", "step", "images", "objects", *names, "objects in its own answers", "text, nats per token"]
    return table(header, rows) if rows else ""


def shapes_table(data: ReportData) -> str:
    """Shape of the distributions at annotated coordinates after each stage, with intervals; empty if not measured."""
    columns: dict[str, dict[str, str]] = {}
    for stage in TRAINED:
        rows = [*last_reading(data, stage).values()]
        for context in dict.fromkeys(name for row in rows for name in row.get("coord_diag", ())):
            columns[f"{stage} {context}"] = {
                name: with_interval(*_shape_mean(data, rows, context, name)) for name in {**MEANINGS, **SHAPES}
            }
    rows_of = [
        [f"`{name}`", meaning, *(column[name] for column in columns.values())]
        for name, meaning in {**MEANINGS, **SHAPES}.items()
        if any(column[name] != MISSING for column in columns.values())
    ]
    return table(["diagnostic", "what it is", *columns], rows_of, "ll" + "r" * len(columns)) if columns else ""


def _shape_mean(
    data: ReportData, rows: Sequence[Json], context: str, name: str
) -> tuple[float | None, list[float] | None]:
    """Mean over the coordinate slots of all images, with its interval over images."""
    sums_I, counts_I = (np.array(column, np.float64) for column in diagnostic_sums(rows, context, name))
    mean, resampled = _ratio(sums_I, counts_I, _reading_weights(data, len(rows)))
    return mean, interval(resampled, mean, is_share=name not in OTHER_UNITS)


def _nats(rows: Sequence[Mapping[str, float]]) -> str:
    n_tokens = sum(row["text_tokens"] for row in rows)
    return f"{sum(row['text_ce'] for row in rows) / n_tokens:.3f}" if n_tokens else MISSING


# Questions answered by the evaluation on val.


def _w1_matters(data: ReportData) -> tuple[str, str]:
    """A fraction of the loss is not an effect on boxes; it only shows whether the term is trained at all."""
    params, share = data.run.params, w1_fraction(data.logs["stage2"])
    if share is None:
        return "not in this run", f"w1_weight {params.w1_weight:g}, softce_weight {params.softce_weight:g}"
    evidence = f"{percent(share)} of softCE + W1 at the end of stage 2, w1_weight {params.w1_weight:g}"
    return NOT_SHOWN, f"{evidence}; only an A/B test of the weight can tell"


def more_duplicates(data: ReportData) -> Difference | None:
    """Duplicate pairs per image, stage 2 minus the control, paired over the images; `better` means more of them."""
    more_I = (_pairs_I(data, "stage2") - _pairs_I(data, "stage1-control")).to_numpy(np.float64)
    return _difference(data, more_I.tolist(), np.ones(len(more_I)).tolist())


def _pairs_I(data: ReportData, checkpoint: str) -> pd.Series:
    """Duplicate pairs of each image, by image id."""
    return data.per_image[checkpoint][f"dup_pairs_{iou_key(min(data.settings.duplicate_ious))}"]


def _duplicates(data: ReportData) -> tuple[str, str]:
    found = more_duplicates(data)
    if found is None:
        return UNDEFINED
    means = ", ".join(f"{name} {number(float(_pairs_I(data, name).mean()))}" for name in TRAINED)
    answer = {Verdict.BETTER: "yes", Verdict.WORSE: "no, they decrease"}.get(found.verdict, NOT_SHOWN)
    return answer, f"pairs per image: {means}; stage2 - stage1-control {found}{_reach(found)}"


def _ranking(data: ReportData) -> tuple[str, str]:
    """Whether the interval of the gain from a perfect ranking lies on one side of HEADROOM_WORTH."""
    headroom = metric(data.metrics, "stage2", "confidence.headroom_mAP")
    bounds = bounds_of(data.metrics, "stage2", "confidence.headroom_mAP")
    if headroom is None or bounds is None:
        return UNDEFINED
    perfect = metric(data.metrics, "stage2", "confidence.perfect_ranking_mAP")
    evidence = f"a perfect ranking of the same boxes would add {with_interval(headroom, bounds)} mAP"
    if checkpoint_faults(data.metrics, "stage2"):
        return NOT_EVALUATED, evidence
    if bounds[0] >= HEADROOM_WORTH:
        return "could be better", evidence
    if perfect < RANKABLE_MAP:
        return NOT_SHOWN, f"{evidence}, for a total of {number(perfect)}: there is too little to rank"
    return ("yes" if bounds[1] < HEADROOM_WORTH else NOT_SHOWN), f"{evidence}; worth a study from {HEADROOM_WORTH:g}"


# Experiments.


def suggestions(data: ReportData) -> list[Suggestion]:
    """Experiments that the numbers suggest, most decisive first; of answers that do not parse, how to fix that."""
    if checkpoint_faults(data.metrics, "stage2"):
        return _on_parsing(data)
    return [
        *_on_the_difference(_main(data)),
        *_on_the_objective(data),
        *_on_the_answers(data),
        *_on_the_contexts(data),
    ]


def _seeds_reach(found: Difference, seeds: int) -> str:
    """What this number of seeds would show; training noise adds to it."""
    after = f"{found.half_width / seeds**0.5:.1g}"
    return f"the difference within ±{after} at best, now ±{found.reach}, and the spread over seeds"


def _on_the_difference(found: Difference | None) -> list[Suggestion]:
    if found is None or found.verdict not in (Verdict.WORSE, Verdict.NO_DIFFERENCE):
        return []
    if found.verdict == Verdict.WORSE:
        rule, because = "stage 2 is worse than the control", f"mAP {found} against the control, with one seed"
        command = "coordexp ab -S stage2.b_ratio=0.0,0.25,0.5 --seeds 3"
        return [Suggestion(because, rule, command, f"whether the rollouts are the cause: {_seeds_reach(found, 3)}")]
    because = f"one seed and this number of images cannot show mAP differences below {found.reach}"
    command = "coordexp ab -S stage2.b_ratio=0.0,0.5 --seeds 5"
    return [Suggestion(because, "no difference from the control shown", command, _seeds_reach(found, 5))]


def _on_the_objective(data: ReportData) -> list[Suggestion]:
    share = w1_fraction(data.logs["stage2"])
    if share is None or share >= W1_INERT:
        return []
    heavier = [f"{data.run.params.w1_weight * factor:g}" for factor in (1, 10, 100)]
    command = f"coordexp ab -S w1_weight={','.join(heavier)} --seeds 3"
    learn = f"whether W1 has an effect on boxes; at {percent(share)} of the loss it may have none in this run"
    return [Suggestion(f"W1 is {percent(share)} of softCE + W1", f"fraction below {percent(W1_INERT)}", command, learn)]


def _on_the_answers(data: ReportData) -> list[Suggestion]:
    made = []
    duplicates = more_duplicates(data)
    if duplicates is not None and duplicates.verdict == Verdict.BETTER:
        because = f"{duplicates} duplicate pairs per image compared with the control"
        command = "coordexp ab -S stage2.missed=append,sorted --seeds 3"
        learn = f"whether appended objects are predicted twice: {_seeds_reach(duplicates, 3)}"
        made.append(Suggestion(because, "duplicates increase", command, learn))
    bounds = bounds_of(data.metrics, "stage2", "confidence.headroom_mAP")
    if bounds is not None and bounds[0] >= HEADROOM_WORTH:
        headroom = with_interval(metric(data.metrics, "stage2", "confidence.headroom_mAP"), bounds)
        because = f"a perfect ranking would add {headroom} mAP"
        learn = "how much of it one of the stored scores already gains"
        made.append(Suggestion(because, f"headroom from {HEADROOM_WORTH:g}", "coordexp answer score", learn))
    return made + _on_parsing(data)


def _on_parsing(data: ReportData) -> list[Suggestion]:
    rate = metric(data.metrics, "stage2", "parse.parse_rate")
    if rate < PARSE_WORTH and data.run.params.decode.grammar == "none":
        because = f"{percent(1 - rate)} of the answers do not parse completely"
        command = "coordexp ab -S decode.grammar=none,any --seeds 1"
        learn = f"how many of these a grammar recovers, at most {percent(1 - rate)}"
        return [Suggestion(because, f"parse rate below {PARSE_WORTH:g}", command, learn)]
    return []


def _on_the_contexts(data: ReportData) -> list[Suggestion]:
    made = []
    forgotten = reading_difference(data, ("stage2", FIRST), ("stage1", FIRST))
    if forgotten is not None and forgotten.verdict == Verdict.BETTER:
        because = f"{forgotten} bins on held-out objects compared with stage 1, in the annotated context"
        command = "coordexp ab -S softce_weight=1.0,2.0 --seeds 3"
        learn = f"whether a larger weight on coordinates prevents this: {_seeds_reach(forgotten, 3)}"
        made.append(Suggestion(because, "coordinates are forgotten", command, learn))
    if data.run.params.stage2.n_softctx_iter == 1:
        command = "coordexp ab -S stage2.n_softctx_iter=1,2 --seeds 3"
        learn = "how far A2 drifts from A1, and whether training on it improves mAP"
        made.append(Suggestion("channel A is one forward", "no self-context in this run", command, learn))
    return made


def suggestions_table(found: Sequence[Suggestion], *, rules: bool = False) -> str:
    """The suggestions as a table, with their rules if `rules` is true; a sentence if no rule fired."""
    if not found:
        return "No rule suggests an experiment."
    rows = [[s.because, f"`{s.command}`", s.learn, *[s.rule] * rules] for s in found]
    header = ["reason", "experiment", "what it will show", *["rule"] * rules]
    return table(header, rows, "l" * len(header))
