"""Rules that turn numbers into answers and next experiments: each fires on its own side of its threshold."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from coordexp.config.loading import read_yaml
from coordexp.experiments.grid import plan_grid
from coordexp.reporting.answers import improved_and_flat, standing_answers, suggestions, suggestions_table
from coordexp.reporting.inputs import ReportData, ReportInputs, load_report_data


@pytest.fixture(scope="module")
def data(inputs: ReportInputs) -> ReportData:
    return load_report_data(inputs)


def with_difference(data: ReportData, lo: float, hi: float) -> ReportData:
    comparison = copy.deepcopy(data.comparison)
    comparison["stage2_vs_control"]["coco.mAP"] = {"delta": (lo + hi) / 2, "lo": lo, "hi": hi, "p_superior": 0.5}
    return dataclasses.replace(data, comparison=comparison)


def answer(data: ReportData, params: Any, question: str) -> str:
    [row] = [line for line in standing_answers(data, params).splitlines() if question in line]
    return row


@pytest.mark.parametrize(
    ("lo", "hi", "words"),
    [(0.01, 0.03, "**yes**"), (-0.03, -0.01, "**no, it is worse**"), (-0.01, 0.03, "**not shown**")],
)
def test_does_stage_2_beat_the_control(
    data: ReportData, inputs: ReportInputs, lo: float, hi: float, words: str
) -> None:
    row = answer(with_difference(data, lo, hi), inputs.params, "beat the control")
    assert words in row
    assert ("could show 0.0200" in row) == (words == "**not shown**")


def test_an_unshown_difference_asks_for_more_seeds_and_a_shown_one_does_not(
    data: ReportData, inputs: ReportInputs
) -> None:
    asked = suggestions(with_difference(data, -0.01, 0.03), inputs.params)[0]
    assert "below 0.0200 mAP are invisible" in asked.because
    better = suggestions(with_difference(data, 0.01, 0.03), inputs.params)
    assert all("control shown" not in s.rule for s in better)


def test_an_inert_w1_asks_for_weights_that_count(data: ReportData, inputs: ReportInputs) -> None:
    assert "no, not at this weight" in answer(data, inputs.params, "W1 matter")
    assert any("w1_weight=0.1,1,10" in s.command for s in suggestions(data, inputs.params))


def test_one_forward_cannot_drift_and_two_are_compared_with_the_control(data: ReportData, inputs: ReportInputs) -> None:
    assert "it cannot" in answer(data, inputs.params, "A2")
    params = copy.deepcopy(dict(inputs.params))
    params["stage2"]["n_softctx_iter"] = 2
    assert "bins at the end of channel A" in answer(data, params, "A2")


def test_duplicates_are_a_subject_from_a_margin_above_the_control(data: ReportData, inputs: ReportInputs) -> None:
    for more, words in ((0.019, "**no**"), (0.021, "**yes**")):
        metrics = copy.deepcopy(data.metrics)
        metrics["stage2"]["set"]["dup_pairs_90"] = metrics["stage1-control"]["set"]["dup_pairs_90"] + more
        changed = dataclasses.replace(data, metrics=metrics)
        assert words in answer(changed, inputs.params, "duplicates")
        assert ("duplicates grow" in {s.rule for s in suggestions(changed, inputs.params)}) == (words == "**yes**")


def test_every_comparison_says_what_improved_and_what_stayed_flat(data: ReportData) -> None:
    lines = improved_and_flat(data)
    assert len(lines) == len(data.comparison)
    assert any("improved: " in line for line in lines)
    for line, rows in zip(lines, data.comparison.values(), strict=True):
        assert all(f"`{key}`" in line for key, row in rows.items() if row is not None)


def test_every_suggested_ab_test_is_one_that_can_be_run(
    data: ReportData, inputs: ReportInputs, repository: Path
) -> None:
    metrics = copy.deepcopy(data.metrics)
    metrics["stage2"]["set"]["dup_pairs_90"] = 9.0
    metrics["stage2"]["parse"]["parse_rate"] = 0.5
    metrics["stage2"]["coco"] |= {"ARs": 0.1, "ARm": 0.9}
    metrics["stage2"]["confidence"]["headroom_mAP"] = 0.2
    stages = read_yaml(repository / "dvc.yaml")["stages"]
    commands = set()
    for lo, hi in ((-0.03, -0.01), (-0.01, 0.03)):
        changed = with_difference(dataclasses.replace(data, metrics=metrics), lo, hi)
        commands |= {s.command for s in suggestions(changed, inputs.params)}
    assert len(commands) >= 6
    for command in commands - {"make decoding-study"}:
        assert plan_grid([command.split(" ")[3]], stages, repository / "params.yaml").trained


def test_no_rule_fired_is_said() -> None:
    assert suggestions_table([]) == "No rule asks for an experiment."
