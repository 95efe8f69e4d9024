"""The rule that turns an interval into a word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.evaluation.effect import Verdict
from coordexp.reporting.verdicts import Difference, count_change, difference_from, explain, f1_of, verdict_of


@given(st.floats(-1, 1), st.floats(0, 1))
def test_swapping_the_sides_swaps_the_verdict(lo: float, width: float) -> None:
    swapped = {
        Verdict.BETTER: Verdict.WORSE,
        Verdict.WORSE: Verdict.BETTER,
        Verdict.NO_DIFFERENCE: Verdict.NO_DIFFERENCE,
    }
    one = Difference(delta=lo, lo=lo, hi=lo + width, p_superior=0.5)
    other = Difference(delta=-lo, lo=-one.hi, hi=-one.lo, p_superior=0.5)
    assert other.verdict is swapped[one.verdict]
    assert other.half_width == pytest.approx(one.half_width)


def test_an_undefined_metric_gets_no_verdict() -> None:
    assert verdict_of(difference_from(None)) is Verdict.UNDEFINED
    row = {"delta": 0.1, "lo": 0.05, "hi": 0.15, "p_superior": 1.0}
    assert verdict_of(difference_from(row)) is Verdict.BETTER


def areas(tp: int, fp: int, fn: int, m_ap: float | None, perfect: float | None) -> dict[str, Any]:
    """The areas of one checkpoint that the explanation reads."""
    return {"f1.tp_50": tp, "f1.fp_50": fp, "f1.fn_50": fn, "coco.mAP": m_ap} | {
        "confidence.perfect_ranking_mAP": perfect,
        **dict.fromkeys(("parse.truncated_rate", "parse.loop_rate", "parse.unreadable_rate"), 0.0),
        "blind.margin_AP50": None,
    }


def explained(new: dict[str, Any], old: dict[str, Any], of_map: Any, of_f1: Any) -> str:
    """The sentence on stage 2 against stage 1 with these metrics and differences."""
    metrics = pd.DataFrame({name: pd.Series(side, dtype=object) for name, side in (("stage2", new), ("stage1", old))})
    rows = {"stage2_vs_stage1": {"coco.mAP": of_map, "f1.full_50": of_f1}}
    return explain(SimpleNamespace(metrics=metrics, comparison=rows), "stage2_vs_stage1")


counts = st.tuples(st.integers(0, 50), st.integers(0, 80), st.integers(0, 80))
shares = st.floats(0, 1)


@given(counts, counts, shares, shares, shares, shares)
def test_parts_add_up(
    a: tuple[int, int, int], b: tuple[int, int, int], map_a: float, top_a: float, map_b: float, top_b: float
) -> None:
    n_objects = 60
    new, old = (
        areas(tp, fp, n_objects - tp, value, top) for (tp, fp, _), value, top in ((a, map_a, top_a), (b, map_b, top_b))
    )
    change = count_change(new, old)
    assert change.f1_by_right_boxes + change.f1_by_number_of_boxes == pytest.approx(change.f1)
    assert change.map_by_boxes_and_names + change.map_by_ranking == pytest.approx(map_a - map_b)


def test_more_false_positives_alone_change_f1_only_by_the_number_of_boxes() -> None:
    change = count_change(areas(10, 20, 10, 0.3, 0.4), areas(10, 5, 10, 0.3, 0.4))
    assert change.f1_by_right_boxes == 0
    assert change.f1 == change.f1_by_number_of_boxes == pytest.approx(20 / 50 - 20 / 35)


def test_f1_without_objects_is_undefined() -> None:
    assert f1_of(0, 0, 0) is f1_of(0, 7, 0) is None
    assert f1_of(0, 0, 7) == 0
    assert f1_of(5, 10, 10) == 0.5
    change = count_change(areas(0, 4, 0, None, None), areas(0, 0, 0, None, None))
    assert (change.f1, change.f1_by_right_boxes, change.f1_by_number_of_boxes) == (None, None, None)
    assert change.false_boxes == 4


RISES = {"delta": 0.1, "lo": 0.05, "hi": 0.15, "p_superior": 1.0}


def test_better_boxes_with_worse_counts_move_map_and_f1_in_opposite_directions() -> None:
    new, old = areas(100, 80, 20, 0.5, 0.60), areas(101, 40, 19, 0.4, 0.48)
    assert explained(new, old, RISES, {"delta": -0.1, "lo": -0.2, "hi": -0.05, "p_superior": 0.0}) == (
        "**stage2 against stage1**: mAP and F1 move in opposite directions: mAP rises, F1 falls. "
        "1 fewer true positive, 40 more false positives, 1 more false negative."
    )
    alone = explained(new, old, RISES, {**RISES, "lo": -0.05})
    assert "opposite" not in alone
    assert "mAP rises, F1 shows no difference." in alone


def test_an_undefined_map_is_not_explained() -> None:
    text = explained(areas(1, 0, 0, None, None), areas(1, 0, 0, None, None), None, None)
    assert "mAP is not defined, F1 is not defined. No change in true positives, no change in false positives" in text
