"""The parts of a change add up to the change."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.reporting.explanation import count_change, explain, f1_of


def areas(tp: int, fp: int, fn: int, m_ap: float | None, perfect: float | None) -> dict[str, Any]:
    """The areas of one checkpoint that the explanation reads."""
    return {
        "f1": {"tp_50": tp, "fp_50": fp, "fn_50": fn},
        "coco": {"mAP": m_ap},
        "confidence": {"perfect_ranking_mAP": perfect},
        "parse": {"truncated_rate": 0.0, "loop_rate": 0.0, "unreadable_rate": 0.0},
    }


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


def test_more_false_boxes_alone_only_cost_by_number() -> None:
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


def test_sharper_boxes_with_worse_counts_read_as_parting() -> None:
    metrics = {"stage2": areas(100, 80, 20, 0.5, 0.60), "stage1": areas(101, 40, 19, 0.4, 0.48)}
    compared = {
        "stage2_vs_stage1": {
            "coco.mAP": {"delta": 0.1, "lo": 0.05, "hi": 0.15, "p_superior": 1.0},
            "f1.full_50": {"delta": -0.1, "lo": -0.2, "hi": -0.05, "p_superior": 0.0},
        }
    }
    assert explain(metrics, compared, "stage2_vs_stage1") == (
        "**stage2 against stage1**: mAP and F1 part: mAP rises, F1 falls. 1 fewer right box, 40 more false boxes, "
        "1 more missed object."
    )


def test_an_undefined_map_is_not_explained() -> None:
    metrics = {"stage2": areas(1, 0, 0, None, None), "stage1": areas(1, 0, 0, None, None)}
    text = explain(metrics, {"stage2_vs_stage1": {"coco.mAP": None, "f1.full_50": None}}, "stage2_vs_stage1")
    assert "mAP is not defined, F1 is not defined. No change in right boxes, no change in false boxes" in text


def test_a_metric_that_shows_no_difference_does_not_part_from_one_that_rises() -> None:
    metrics = {"stage2": areas(100, 80, 20, 0.5, 0.60), "stage1": areas(101, 80, 19, 0.4, 0.48)}
    rises = {"delta": 0.1, "lo": 0.05, "hi": 0.15, "p_superior": 1.0}
    compared = {"stage2_vs_stage1": {"coco.mAP": rises, "f1.full_50": {**rises, "lo": -0.05}}}
    text = explain(metrics, compared, "stage2_vs_stage1")
    assert "part" not in text
    assert "mAP rises, F1 shows no difference." in text
