"""Rules that turn numbers into answers and next experiments: each fires on its own side of its threshold."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from coordexp.experiments.plan import grid_study, plan_study
from coordexp.infra.logs import read_log
from coordexp.reporting.answers import improved_and_flat, standing_answers, suggestions, suggestions_table
from coordexp.reporting.inputs import ReportData, ReportInputs, load_report_data
from reporting.synthetic import changed, write_rows


@pytest.fixture(scope="module")
def data(inputs: ReportInputs) -> ReportData:
    return load_report_data(inputs)


def with_difference(data: ReportData, lo: float, hi: float) -> ReportData:
    comparison = copy.deepcopy(data.comparison)
    comparison["stage2_vs_control"]["coco.mAP"] = {"delta": (lo + hi) / 2, "lo": lo, "hi": hi, "p_superior": 0.5}
    return dataclasses.replace(data, comparison=comparison)


def answer(data: ReportData, question: str) -> str:
    [row] = [line for line in standing_answers(data).splitlines() if question in line]
    return row


@pytest.mark.parametrize(
    ("lo", "hi", "words"),
    [(0.01, 0.03, "**yes**"), (-0.03, -0.01, "**no, it is worse**"), (-0.01, 0.03, "**not shown**")],
)
def test_does_stage_2_beat_the_control(
    data: ReportData, inputs: ReportInputs, lo: float, hi: float, words: str
) -> None:
    row = answer(with_difference(data, lo, hi), "beat the control")
    assert words in row
    assert ("could show 0.0200" in row) == (words == "**not shown**")


def test_an_unshown_difference_asks_for_more_seeds_and_a_shown_one_does_not(
    data: ReportData, inputs: ReportInputs
) -> None:
    asked = suggestions(with_difference(data, -0.01, 0.03))[0]
    assert "below 0.0200 mAP are invisible" in asked.because
    better = suggestions(with_difference(data, 0.01, 0.03))
    assert all("control shown" not in s.rule for s in better)


def test_a_share_of_the_loss_asks_for_weights_that_count_and_answers_nothing(
    data: ReportData, inputs: ReportInputs
) -> None:
    row = answer(data, "W1 matter")
    assert "**not shown**" in row
    assert "only an A/B test" in row
    assert any("w1_weight=0.1,1,10" in s.command for s in suggestions(data))


def drift_row(data: ReportData, n_forwards: int, rows: list[dict[str, Any]], path: Path) -> str:
    write_rows(path, [{"step": n, "loss/total": 1.0, **row} for n, row in enumerate(rows)])
    logs = {**data.logs, "stage2": read_log(path)}
    run = dataclasses.replace(data.run, params=changed(data.run.params, stage2__n_softctx_iter=n_forwards))
    return answer(dataclasses.replace(data, run=run, logs=logs), "A2")


def step_of_a(a1: float | None, a2: float) -> dict[str, Any]:
    first = {} if a1 is None else {"coord_diag_a1/expected_bin_mae": a1}
    return {"channel": "A", "coord_diag/expected_bin_mae": a2, **first}


B = {"channel": "B", "coord_diag/expected_bin_mae": 90.0}


@pytest.mark.parametrize(
    ("n_forwards", "rows", "words", "evidence"),
    [
        # The control of the fixture ends at 6 bins or so: it is another model on other images, and has no say.
        (2, [step_of_a(20, 40), B, step_of_a(21, 42), step_of_a(19, 37)], "**yes**", "20.0 bins at A1, 39.7 at A2"),
        (2, [step_of_a(40, 20), step_of_a(42, 21), B, step_of_a(37, 19)], "**no, A2 is nearer**", "paired -19.7 ["),
        (2, [step_of_a(20, 21), step_of_a(20, 19), step_of_a(20, 20.5)], "**not shown**", "over 3 training steps"),
        (3, [step_of_a(20, 20), step_of_a(20, 20)], "**not shown**", "+0.0 [+0.0, +0.0]"),
        (2, [step_of_a(20, 40)], "**not shown**", "in one step"),
        (2, [step_of_a(None, 40), step_of_a(None, 41), B], "**not shown**", "no step logs the first forward"),
        (1, [step_of_a(None, 40)], "**none to measure**", "one forward"),
    ],
)
def test_the_last_forward_is_compared_with_the_first_of_the_same_steps(
    data: ReportData, inputs: ReportInputs, tmp_path: Path, n_forwards: int, rows: Any, words: str, evidence: str
) -> None:
    row = drift_row(data, n_forwards, rows, tmp_path / "train_log.jsonl")
    assert words in row
    assert evidence in row


def test_what_only_training_steps_could_say_is_not_said(data: ReportData, inputs: ReportInputs) -> None:
    """The log of the fixture falls in channel B, and channel A ends far from the control."""
    logs = copy.deepcopy(data.logs)
    logs["stage2"]["coord_diag/expected_bin_mae"] *= 3
    other = dataclasses.replace(data, logs=logs)
    text = standing_answers(other)
    assert "its own answers" not in text
    assert suggestions(other) == suggestions(data)


@pytest.mark.parametrize(("everywhere", "words"), [(1, "**yes**"), (-1, "**no, they shrink**"), (0, "**not shown**")])
def test_duplicates_grow_if_the_interval_over_images_says_so(
    data: ReportData, inputs: ReportInputs, everywhere: int, words: str
) -> None:
    rows = copy.deepcopy(data.per_image)
    rows["stage1-control"]["dup_pairs_90"] = 5
    rows["stage2"]["dup_pairs_90"] = 5 + everywhere
    if not everywhere:  # one image alone moves the mean, and proves nothing
        rows["stage2"].iloc[0, rows["stage2"].columns.get_loc("dup_pairs_90")] += 3
    other = dataclasses.replace(data, per_image=rows)
    assert words in answer(other, "duplicates")
    assert ("duplicates grow" in {s.rule for s in suggestions(other)}) == (words == "**yes**")


@pytest.mark.parametrize(
    ("headroom", "bounds", "perfect", "words"),
    [
        (0.05, [0.04, 0.06], 0.5, "**could be better**"),
        (0.03, [0.02, 0.04], 0.5, "**not shown**"),
        (0.01, [0.0, 0.02], 0.5, "**yes**"),
        (0.0002, [0.0, 0.0004], 0.0003, "**not shown**"),  # next to nothing is found, so there is nothing to rank
        (None, None, None, "not defined on this data"),
    ],
)
def test_the_score_ranks_well_if_an_interval_says_so_and_there_is_something_to_rank(
    data: ReportData, inputs: ReportInputs, headroom: Any, bounds: Any, perfect: Any, words: str
) -> None:
    metrics = copy.deepcopy(data.metrics)
    metrics.at["confidence.headroom_mAP", "stage2"] = headroom
    metrics.at["confidence.perfect_ranking_mAP", "stage2"] = perfect
    metrics.at["interval.confidence.headroom_mAP", "stage2"] = bounds
    assert words in answer(dataclasses.replace(data, metrics=metrics), "rank well")


def test_every_comparison_says_what_improved_and_what_shows_no_difference(data: ReportData) -> None:
    lines = improved_and_flat(data)
    assert len(lines) == len(data.comparison)
    assert any("improved: " in line for line in lines)
    for line, rows in zip(lines, data.comparison.values(), strict=True):
        assert all(f"`{key}`" in line for key, row in rows.items() if row is not None)


def test_every_suggested_ab_test_is_one_that_can_be_run(
    data: ReportData, inputs: ReportInputs, repository: Path
) -> None:
    metrics = copy.deepcopy(data.metrics)
    metrics.at["parse.parse_rate", "stage2"] = 0.5
    metrics.at["interval.confidence.headroom_mAP", "stage2"] = [0.1, 0.3]
    per_image = copy.deepcopy(data.per_image)
    per_image["stage2"]["dup_pairs_90"] += 2
    data = dataclasses.replace(data, per_image=per_image)
    commands = set()
    for lo, hi in ((-0.03, -0.01), (-0.01, 0.03)):
        other = with_difference(dataclasses.replace(data, metrics=metrics), lo, hi)
        commands |= {s.command for s in suggestions(other)}
    assert len(commands) == 6
    for command in commands - {"make decoding-study"}:
        assert plan_study(grid_study([command.split(" ")[3]], command), repository).seed_keys


def test_no_rule_fired_is_said() -> None:
    assert suggestions_table([]) == "No rule asks for an experiment."
