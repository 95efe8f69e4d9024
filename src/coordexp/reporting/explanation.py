"""Why F1 and mAP move together or apart, by counts.

Two identities carry it, so that the parts add up to the whole:

* F1 = 2 TP / (boxes + objects). Its change is split into what more right boxes give and what the number of boxes takes,
  each the mean over both orders of changing one after the other (Shapley's rule for two players).
* mAP = mAP under a perfect ranking - what the actual ranking loses. The first term knows boxes and names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordexp.config.paths import COMPARISONS
from coordexp.evaluation.effect import Verdict
from coordexp.reporting.inputs import Json, Metrics, metric
from coordexp.reporting.markdown import MISSING, signed, table
from coordexp.reporting.verdicts import compared, verdict_of


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
    """F1 from right boxes, judged boxes and objects; None without objects."""
    return 2 * tp / (n_boxes + n_objects) if n_objects else None


def count_change(new: Json, old: Json) -> CountChange:
    """Split the change of F1 and mAP between the metrics of two checkpoints on the same images."""
    (tp, boxes, objects), (tp_old, boxes_old, _) = _counts(new["f1"]), _counts(old["f1"])
    change = _minus(f1_of(tp, boxes, objects), f1_of(tp_old, boxes_old, objects))
    orders = [_minus(f1_of(tp, n, objects), f1_of(tp_old, n, objects)) for n in (boxes_old, boxes)]
    known = [part for part in orders if part is not None]
    by_right = sum(known) / len(orders) if known else None
    return CountChange(
        right_boxes=tp - tp_old,
        false_boxes=new["f1"]["fp_50"] - old["f1"]["fp_50"],
        missed=new["f1"]["fn_50"] - old["f1"]["fn_50"],
        f1=change,
        f1_by_right_boxes=by_right,
        f1_by_number_of_boxes=_minus(change, by_right),
        map_by_boxes_and_names=_minus(_perfectly_ranked(new), _perfectly_ranked(old)),
        map_by_ranking=_minus(_ranking_part(new), _ranking_part(old)),
    )


def _counts(f1: Json) -> tuple[int, int, int]:
    return f1["tp_50"], f1["tp_50"] + f1["fp_50"], f1["tp_50"] + f1["fn_50"]


def _perfectly_ranked(areas: Json) -> float | None:
    return areas["confidence"]["perfect_ranking_mAP"]


def _ranking_part(areas: Json) -> float | None:
    return _minus(areas["coco"]["mAP"], _perfectly_ranked(areas))


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


_MOVES = {
    Verdict.BETTER: "rises",
    Verdict.WORSE: "falls",
    Verdict.NO_DIFFERENCE: "shows no difference",
    Verdict.UNDEFINED: "is not defined",
    Verdict.NOT_JUDGED: "is not judged",
}


def explanation_table(metrics: Metrics) -> str:
    """One row per comparison: the change of mAP and of F1, each in its parts, and the counts behind."""
    rows = []
    for new, old in COMPARISONS.values():
        change = count_change(metrics[new], metrics[old])
        d_map = _minus(metric(metrics, new, "coco.mAP"), metric(metrics, old, "coco.mAP"))
        of_map = (d_map, change.map_by_boxes_and_names, change.map_by_ranking)
        of_f1 = (change.f1, change.f1_by_right_boxes, change.f1_by_number_of_boxes)
        counts = (change.right_boxes, change.false_boxes, change.missed)
        rows.append([f"{new} - {old}", *(MISSING if v is None else signed(v) for v in (*of_map, *of_f1, *counts))])
    changes = ["mAP", "by boxes and names", "by ranking", "F1", "by right boxes", "by number of boxes"]
    return table(["difference", *changes, "right", "false", "missed"], rows)


def explain(metrics: Metrics, comparison: Mapping[str, Json], name: str) -> str:
    """One or two sentences on one comparison: how mAP and F1 move, and the counts behind."""
    new, old = COMPARISONS[name]
    differences = compared(metrics, comparison, name)
    of_map, of_f1 = (verdict_of(differences[key]) for key in ("coco.mAP", "f1.full_50"))
    change = count_change(metrics[new], metrics[old])
    counts = ", ".join(
        (
            _count(change.right_boxes, "right box", "right boxes"),
            _count(change.false_boxes, "false box", "false boxes"),
            _count(change.missed, "missed object", "missed objects"),
        )
    )
    moves = f"mAP {_MOVES[of_map]}, F1 {_MOVES[of_f1]}"
    opposed = {of_map, of_f1} == {Verdict.BETTER, Verdict.WORSE}
    part = "mAP and F1 part: " if opposed else ""
    return f"**{new} against {old}**: {part}{moves}. {counts[0].upper()}{counts[1:]}."


def _count(n: int, one: str, many: str) -> str:
    noun = one if abs(n) == 1 else many
    return f"no change in {many}" if n == 0 else f"{abs(n)} {'more' if n > 0 else 'fewer'} {noun}"
