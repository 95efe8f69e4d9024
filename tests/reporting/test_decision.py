"""Page one: what it decides, when it decides nothing, and that its tables are those of the metrics."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from coordexp.reporting.answers import Answer, standing_answers
from coordexp.reporting.checklist import Check
from coordexp.reporting.decision import (
    ONE_SEED,
    checks_line,
    decision,
    error_budget,
    headline,
    main_table,
    standing_lines,
)
from coordexp.reporting.inputs import TRAINED, ReportData, ReportInputs, load_report_data

BETTER, WORSE, NEITHER = (0.01, 0.03), (-0.03, -0.01), (-0.01, 0.03)


@pytest.fixture(scope="module")
def data(inputs: ReportInputs) -> ReportData:
    """A run all of whose trained checkpoints answer soundly and better than blindly."""
    loaded = load_report_data(inputs)
    metrics = copy.deepcopy(loaded.metrics)
    for name in metrics:
        metrics.at["interval.blind.margin_AP50", name] = [0.1, 0.2]
    return dataclasses.replace(loaded, metrics=metrics)


def with_map(data: ReportData, **bounds: tuple[float, float] | None) -> ReportData:
    comparison = copy.deepcopy(data.comparison)
    for name, found in bounds.items():
        row = None if found is None else {"delta": sum(found) / 2, "lo": found[0], "hi": found[1], "p_superior": 0.5}
        comparison[name]["coco.mAP"] = row
    return dataclasses.replace(data, comparison=comparison)


@pytest.mark.parametrize(
    ("control", "stage1", "words"),
    [
        (BETTER, BETTER, "**Use stage 2**"),
        (BETTER, NEITHER, "**Keep stage 1**"),
        (NEITHER, BETTER, "**Continue training; no benefit of stage 2 itself is shown**"),
        (NEITHER, NEITHER, "**Keep stage 1**"),
        (WORSE, BETTER, "**Continue stage 1 instead of stage 2**"),
        (WORSE, NEITHER, "**Continue stage 1 instead of stage 2**"),
        (NEITHER, WORSE, "**Keep stage 1**"),
        (WORSE, WORSE, "**Drop stage 2**"),
        (None, NEITHER, "**No decision**"),
    ],
)
def test_the_first_line_is_what_the_two_comparisons_support(data: ReportData, control, stage1, words) -> None:
    found = decision(with_map(data, stage2_vs_control=control, stage2_vs_stage1=stage1, stage1_vs_base=BETTER))
    assert found[0].startswith(words)
    assert found[0].endswith(ONE_SEED) == (control is not None)
    assert len(found) == 4


def test_nothing_learned_comes_before_everything(data: ReportData) -> None:
    metrics = copy.deepcopy(data.metrics)
    for name in TRAINED:
        metrics.at["blind.margin_AP50", name], metrics.at["interval.blind.margin_AP50", name] = 0.0, [-0.1, 0.1]
    better = with_map(data, stage2_vs_control=BETTER, stage2_vs_stage1=BETTER, stage1_vs_base=BETTER)
    lines = decision(dataclasses.replace(better, metrics=metrics))
    assert lines[0].startswith("**Nothing was learned**, so there is no decision to make")
    assert all("this data set does not show that it learned anything" in line for line in lines[1:4])
    assert not [line for line in lines if "is **better**" in line and "stage 2" in line.lower()]


@pytest.mark.parametrize("bounds", [NEITHER, WORSE])
def test_a_stage_1_that_is_no_better_than_the_base_ends_the_decision(data: ReportData, bounds) -> None:
    lines = decision(with_map(data, stage1_vs_base=bounds, stage2_vs_control=BETTER, stage2_vs_stage1=BETTER))
    assert lines[0].startswith("**Nothing was learned**: stage 1 is not shown to be better than the base model")


def test_the_headline_gives_the_minimum_detectable_difference(data: ReportData) -> None:
    row = {"delta": 0.0042, "lo": -0.008, "hi": 0.0161, "p_superior": 0.75}
    comparison = {"stage2_vs_control": {"coco.mAP": row, "f1.full_50": row}}
    line = headline(dataclasses.replace(data, comparison=comparison), "stage2_vs_control")
    assert line.startswith("**No difference shown** between stage 2 and the control: mAP ")
    assert "difference +0.004 [-0.008, +0.016]; minimum detectable difference about 0.012" in line


def test_five_rows_and_the_costliest_error_first(data: ReportData) -> None:
    assert len(main_table(data).splitlines()) == 2 + 5
    rows = [line.strip("|").split(" | ") for line in error_budget(data).splitlines()[2:]]
    costs = [float(row[3]) for row in rows]
    assert len(rows) == 6
    assert costs == sorted(costs, reverse=True)
    known = data.metrics.loc[[f"errors.{n}" for n in ("missed", "both", "background", "duplicate")], "stage2"]
    assert set(known) <= {int(row[4]) for row in rows}


def test_every_standing_question_is_in_one_of_two_lines(data: ReportData) -> None:
    answers = standing_answers(data)
    lines = standing_lines(answers)
    assert all(sum(a.question.rstrip("?") in line for line in lines) == 1 for a in answers)
    assert standing_lines([Answer("Is it?", "yes", "")]) == ["Shown: Is it? **yes**."]
    assert standing_lines([Answer("Is it?", "not shown", "")]) == ["Not shown: Is it."]


def test_failed_checks_are_named_and_others_counted() -> None:
    checks = [Check("one holds", True, ""), Check("two fails", False, ""), Check("three is open", None, "")]
    line = checks_line(checks)
    assert line.startswith("1 of 3 checks hold; **1 failed**: two fails; 1 cannot be determined")
    assert "one holds" not in line
