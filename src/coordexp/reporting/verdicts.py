"""The paired differences of metrics.json with their verdicts, what outranks a verdict, and why F1 and mAP move.

The explanation rests on two identities, so that the parts add up to the whole:

* F1 = 2 TP / (boxes + objects). Its change is split into the effect of the true positives and that of the number of
  boxes, each the mean over both orders of changing one after the other (Shapley's rule for two players).
* mAP = mAP under a perfect ranking - what the actual ranking loses. The first term depends on boxes and names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.config.paths import CHECKPOINTS, COMPARISONS
from coordexp.evaluation.blind import MARGIN, learned_nothing
from coordexp.evaluation.effect import Verdict, verdict_of_interval
from coordexp.evaluation.parse import FAULTS, MOST_FAULTY, faults_of
from coordexp.matching.summary import f1_from_counts
from coordexp.reporting.inputs import Metrics, ReportData, bounds_of, metric
from coordexp.reporting.markdown import MISSING, decimals, signed, table, with_interval

RULE = (
    "A difference is called **better** or **worse** if its 95 % interval (paired bootstrap over images) excludes 0; "
    "otherwise, **no difference shown**. The interval covers the choice of images, not the training seed."
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference new - old with its 95 % interval; `judged` is False if a side cannot be evaluated."""

    delta: float
    lo: float
    hi: float
    p_superior: float
    judged: bool = True

    @property
    def half_width(self) -> float:
        """About the minimum detectable difference with this number of images."""
        return (self.hi - self.lo) / 2

    @property
    def verdict(self) -> Verdict:
        """The verdict, for a metric of which higher is better; all compared metrics are of that kind."""
        return verdict_of_interval(self.lo, self.hi) if self.judged else Verdict.NOT_JUDGED

    @property
    def reach(self) -> str:
        """The half-width, with the digits of the interval."""
        return f"{self.half_width:.{decimals((self.lo, self.hi))}f}"

    def __str__(self) -> str:
        return with_interval(self.delta, (self.lo, self.hi), sign=True)


def difference_from(row: Mapping[str, float] | None, *, judged: bool = True) -> Difference | None:
    """The difference of one row of metrics.json's `comparison`; None where a metric is undefined on either side."""
    return None if row is None else Difference(row["delta"], row["lo"], row["hi"], row["p_superior"], judged)


def compared(data: ReportData, name: str) -> dict[str, Difference | None]:
    """Metric -> difference of one comparison, None where it is undefined on either side.

    No difference is evaluated if the answers of a side are truncated, loop or do not parse, or if neither side beats
    the blind controls.
    """
    sides = COMPARISONS[name]
    judged = not any(checkpoint_faults(data.metrics, checkpoint) for checkpoint in sides)
    judged = judged and not all(nothing_learned(data.metrics, checkpoint) for checkpoint in sides)
    return {key: difference_from(row, judged=judged) for key, row in data.comparison[name].items()}


def verdict_of(difference: Difference | None) -> Verdict:
    """The verdict, or `not defined`."""
    return Verdict.UNDEFINED if difference is None else difference.verdict


def checkpoint_faults(metrics: Metrics, checkpoint: str) -> list[str]:
    """The faults of the answers of a checkpoint, in words; raises DataError if the evaluation did not count them."""
    return faults_of({"parse": {key.removeprefix("parse."): metric(metrics, checkpoint, key) for key in FAULTS}})


def nothing_learned(metrics: Metrics, checkpoint: str) -> str:
    """Why a checkpoint shows no learning, in words; empty if it beats every blind control."""
    return learned_nothing(metric(metrics, checkpoint, MARGIN), bounds_of(metrics, checkpoint, MARGIN))


def warnings(metrics: Metrics) -> list[str]:
    """One line with the reason for each checkpoint that learned nothing or is not evaluated; empty if there is none."""
    found = {name: checkpoint_faults(metrics, name) for name in CHECKPOINTS}
    lines = [
        f"**{name} is not evaluated**: {', '.join(faults)} (of {metric(metrics, name, 'coco.n_images')} on val; "
        f"above {100 * MOST_FAULTY:g} %, no score measures how well it detects)."
        for name, faults in found.items()
        if faults
    ]
    blind = {name: nothing_learned(metrics, name) for name in CHECKPOINTS}
    return lines + [
        f"**{name}: this data set does not show that it learned anything**: {why} (predictions made without the image)."
        for name, why in blind.items()
        if why and not found[name]
    ]


def comparison_table(data: ReportData) -> str:
    """Paired differences with verdicts and minimum detectable differences (half the width of the interval)."""
    rows = []
    for name, (new, old) in COMPARISONS.items():
        for key, found in compared(data, name).items():
            cells = [MISSING] * 3
            if found is not None:
                cells = [str(found), f"{found.p_superior:.2f}", found.reach]
            rows.append([f"{new} - {old}", f"`{key}`", *cells, verdict_of(found).value])
    header = ["difference", "metric", "delta, 95 % interval", "P(superior)", "minimum detectable", "verdict"]
    return table(header, rows, "llrrrl")


@dataclass(frozen=True, slots=True)
class CountChange:
    """The change from one checkpoint to another; parts of one metric add up to its change, None where undefined."""

    right_boxes: int
    false_boxes: int
    missed: int
    f1: float | None
    f1_by_right_boxes: float | None
    f1_by_number_of_boxes: float | None
    map_by_boxes_and_names: float | None
    map_by_ranking: float | None


def f1_of(tp: int, n_boxes: int, n_objects: int) -> float | None:
    """F1 from true positives, evaluated boxes and objects; None without objects."""
    return float(f1_from_counts((tp, n_boxes - tp, n_objects - tp))) if n_objects else None


def count_change(new: Mapping[str, Any], old: Mapping[str, Any]) -> CountChange:
    """Split the change of F1 and mAP between the metrics ("area.metric") of two checkpoints on the same images."""
    (tp, boxes, objects), (tp_old, boxes_old, _) = _counts(new), _counts(old)
    change = _minus(f1_of(tp, boxes, objects), f1_of(tp_old, boxes_old, objects))
    orders = [_minus(f1_of(tp, n, objects), f1_of(tp_old, n, objects)) for n in (boxes_old, boxes)]
    known = [part for part in orders if part is not None]
    by_right = sum(known) / len(orders) if known else None
    perfect, perfect_old = (side["confidence.perfect_ranking_mAP"] for side in (new, old))
    return CountChange(
        right_boxes=tp - tp_old,
        false_boxes=new["f1.fp_50"] - old["f1.fp_50"],
        missed=new["f1.fn_50"] - old["f1.fn_50"],
        f1=change,
        f1_by_right_boxes=by_right,
        f1_by_number_of_boxes=_minus(change, by_right),
        map_by_boxes_and_names=_minus(perfect, perfect_old),
        map_by_ranking=_minus(_minus(new["coco.mAP"], perfect), _minus(old["coco.mAP"], perfect_old)),
    )


def _counts(metrics: Mapping[str, Any]) -> tuple[int, int, int]:
    tp = metrics["f1.tp_50"]
    return tp, tp + metrics["f1.fp_50"], tp + metrics["f1.fn_50"]


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def explanation_table(metrics: Metrics) -> str:
    """One row per comparison: the changes of mAP and F1, each in its parts, and the counts behind them."""
    rows = []
    for new, old in COMPARISONS.values():
        change = count_change(metrics[new], metrics[old])
        d_map = _minus(metric(metrics, new, "coco.mAP"), metric(metrics, old, "coco.mAP"))
        of_map = (d_map, change.map_by_boxes_and_names, change.map_by_ranking)
        of_f1 = (change.f1, change.f1_by_right_boxes, change.f1_by_number_of_boxes)
        counts = (change.right_boxes, change.false_boxes, change.missed)
        rows.append([f"{new} - {old}", *(MISSING if v is None else signed(v) for v in (*of_map, *of_f1, *counts))])
    changes = ["mAP", "by boxes and names", "by ranking", "F1", "by true positives", "by number of boxes"]
    return table(["difference", *changes, "true positives", "false positives", "false negatives"], rows)


_MOVES = {
    Verdict.BETTER: "rises",
    Verdict.WORSE: "falls",
    Verdict.NO_DIFFERENCE: "shows no difference",
    Verdict.UNDEFINED: "is not defined",
    Verdict.NOT_JUDGED: "is not evaluated",
}


def explain(data: ReportData, name: str) -> str:
    """One or two sentences on one comparison: how mAP and F1 move, and the counts behind them."""
    new, old = COMPARISONS[name]
    differences = compared(data, name)
    of_map, of_f1 = (verdict_of(differences[key]) for key in ("coco.mAP", "f1.full_50"))
    change = count_change(data.metrics[new], data.metrics[old])
    counts = ", ".join(
        (
            _count(change.right_boxes, "true positive", "true positives"),
            _count(change.false_boxes, "false positive", "false positives"),
            _count(change.missed, "false negative", "false negatives"),
        )
    )
    moves = f"mAP {_MOVES[of_map]}, F1 {_MOVES[of_f1]}"
    opposed = {of_map, of_f1} == {Verdict.BETTER, Verdict.WORSE}
    part = "mAP and F1 move in opposite directions: " if opposed else ""
    return f"**{new} against {old}**: {part}{moves}. {counts[0].upper()}{counts[1:]}."


def _count(n: int, one: str, many: str) -> str:
    noun = one if abs(n) == 1 else many
    return f"no change in {many}" if n == 0 else f"{abs(n)} {'more' if n > 0 else 'fewer'} {noun}"
