"""Rules that turn numbers into answers and next experiments: each fires on its own side of its threshold."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from coordexp.experiments.plan import grid_study, plan_study
from coordexp.reporting.answers import (
    answers_table,
    improved_and_flat,
    shapes_table,
    standing_answers,
    suggestions,
    suggestions_table,
)
from coordexp.reporting.inputs import ReportData, ReportInputs, load_report_data
from reporting.synthetic import changed


@pytest.fixture(scope="module")
def data(inputs: ReportInputs) -> ReportData:
    return load_report_data(inputs)


def with_difference(data: ReportData, lo: float, hi: float) -> ReportData:
    comparison = copy.deepcopy(data.comparison)
    comparison["stage2_vs_control"]["coco.mAP"] = {"delta": (lo + hi) / 2, "lo": lo, "hi": hi, "p_superior": 0.5}
    return dataclasses.replace(data, comparison=comparison)


def answer(data: ReportData, question: str) -> str:
    [row] = [line for line in answers_table(standing_answers(data)).splitlines() if question in line]
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
    assert ("minimum detectable difference 0.020" in row) == (words == "**not shown**")


def test_only_an_unshown_difference_suggests_more_seeds(data: ReportData, inputs: ReportInputs) -> None:
    asked = suggestions(with_difference(data, -0.01, 0.03))[0]
    assert "cannot show mAP differences below 0.020" in asked.because
    better = suggestions(with_difference(data, 0.01, 0.03))
    assert all("control shown" not in s.rule for s in better)


def test_a_small_fraction_of_the_loss_suggests_larger_weights_and_answers_no_question(
    data: ReportData, inputs: ReportInputs
) -> None:
    row = answer(data, "Does W1 have an effect")
    assert "**not shown**" in row
    assert "only an A/B test" in row
    assert any("w1_weight=0.1,1,10" in s.command for s in suggestions(data))


STEPS = {"stage1": 400, "stage1_control": 100, "stage2": 100}


def reading(step: int, image_id: int, **lists: Any) -> dict[str, Any]:
    return {"step": step, "image_id": image_id, "text_ce": 6.0, "text_tokens": 20, "own": [None, None], **lists}


def with_readings(data: ReportData, n_forwards: int = 1, **by_stage: list[dict[str, Any]] | None) -> ReportData:
    """Other readings of the stages, under their names with `_` for `-`."""
    contexts = data.contexts | {name.replace("_", "-"): rows for name, rows in by_stage.items()}
    run = dataclasses.replace(data.run, params=changed(data.run.params, stage2__n_softctx_iter=n_forwards))
    return dataclasses.replace(data, run=run, contexts=contexts)


def test_shapes_of_distributions_are_means_over_slots_with_an_interval(data: ReportData) -> None:
    header, _, *rows = shapes_table(data).splitlines()
    assert header.endswith("what it is | stage1 A1 | stage1-control A1 | stage2 A1 |")
    assert any(row.startswith("| `coverage_90` |") and "0.2500 [0.2500, 0.2500]" in row for row in rows)
    assert not any("p90" in row for row in rows)
    shapes = [{"A1": {"p_gt_mean": v}, "A2": {}} for v in (0.2, 0.8)]
    uneven = [reading(100, n, A1=[1.0] * (n + 1), A2=[], coord_diag=shapes[n]) for n in (0, 1)]
    [_, _, row] = shapes_table(with_readings(data, 2, stage1=[], stage1_control=None, stage2=uneven)).splitlines()
    assert row.split(" | ")[2].startswith("0.6")
    assert row.endswith("| n/a |")
    assert shapes_table(with_readings(data, stage1=None, stage1_control=None, stage2=None)) == ""


def pairs(first: float, second: float, spread: float = 1.0, images: int = 12) -> list[dict[str, Any]]:
    """Images whose objects are off by `first` in A1 and by `second` in A2, more or less."""
    signs = [(-1) ** i * spread for i in range(images)]
    return [reading(100, i, A1=[first, first], A2=[second + signs[i], second - 2 * signs[i]]) for i in range(images)]


@pytest.mark.parametrize(
    ("n_forwards", "rows", "words", "evidence"),
    [
        (2, pairs(20, 40), "**yes**", "stage2 A2 - stage2 A1, objects in both: +20."),
        (2, pairs(40, 20), "**no, A2 has smaller errors**", ": -20."),
        (2, pairs(20, 20.1, spread=30), "**not shown**", "12 dev images: error in bins"),
        (2, pairs(20, 40, images=7), "**not shown**", "7 dev images, fewer than the 8"),
        (2, [reading(100, 1, A1=[20.0, 20.0])], "**not shown**", "no object was read in both contexts"),
        (2, [], "**not shown**", "no dev image was read at the end of stage2"),
        (2, None, "**not shown**", "no dev image was read at the end of stage2"),
        (1, pairs(20, 40), "**not applicable**", "one forward"),
    ],
)
def test_the_last_forward_is_compared_with_the_first_on_held_out_objects(
    data: ReportData, n_forwards: int, rows: Any, words: str, evidence: str
) -> None:
    row = answer(with_readings(data, n_forwards, stage2=rows), "A2")
    assert words in row
    assert evidence in row


def test_only_the_last_evaluation_of_a_stage_is_read(data: ReportData) -> None:
    early = [row | {"step": 50, "A2": [1.0, 1.0]} for row in pairs(20, 40)]
    assert answer(with_readings(data, 2, stage2=[*early, *pairs(20, 40)]), "A2") == answer(
        with_readings(data, 2, stage2=pairs(20, 40)), "A2"
    )


@pytest.mark.parametrize(
    ("question", "stage1", "control", "stage2", "words"),
    [
        ("larger errors in its own answers", (20, 20), (20, 20), (20, 28), "**yes**"),
        ("larger errors in its own answers", (20, 20), (20, 20), (20, 12), "**no, smaller errors**"),
        ("smaller errors in its own answers", (20, 30), (20, 30), (20, 25), "**yes**"),
        ("smaller errors in its own answers", (20, 30), (20, 30), (20, 36), "**no, larger errors**"),
        ("smaller errors in its own answers", (20, 40), (20, 30), (20, 30), "**not shown**"),  # stage 1 does not matter
        ("forget coordinates", (20, 30), (5, 5), (26, 30), "**yes**"),  # the control has none here
        ("forget coordinates", (26, 30), (20, 30), (20, 30), "**no, smaller errors**"),
    ],
)
def test_contexts_and_stages_are_compared_on_the_same_objects(
    data: ReportData, question: str, stage1: Any, control: Any, stage2: Any, words: str
) -> None:
    """(A1, own) of each stage, more or less; objects of one side alone would reverse every answer."""
    rows = {
        stage: [
            reading(STEPS[stage], i, A1=[a1 + (-1) ** i, a1], own=[own - (-1) ** i, alone])
            for i in range(12)
        ]
        for stage, (a1, own), alone in (
            ("stage1", stage1, None), ("stage1_control", control, 900.0), ("stage2", stage2, None)
        )
    }  # fmt: skip
    assert words in answer(with_readings(data, **rows), question)


@pytest.mark.parametrize(
    ("more", "words"),
    [([1.0] * 12, "**yes**"), ([-1.0] * 12, "**no, it is more probable**"), ([1.0, -1.0] * 6, "**not shown**")],
)
def test_text_is_compared_with_stage_1_token_by_token(data: ReportData, more: list[float], words: str) -> None:
    before = [reading(400, i, A1=[1.0, 1.0]) for i in range(12)]
    after = [reading(100, i, A1=[1.0, 1.0], text_ce=6.0 + more[i]) for i in range(12)]
    assert words in answer(with_readings(data, stage1=before, stage2=after), "forget text")


def test_training_steps_alone_change_no_answer(data: ReportData) -> None:
    """Whatever the log of stage 2 shows of coordinates, no answer and no suggestion moves."""
    logs = copy.deepcopy(data.logs)
    logs["stage2"][[c for c in logs["stage2"] if c.startswith("coord_diag")]] *= 3
    other = dataclasses.replace(data, logs=logs)
    assert standing_answers(other) == standing_answers(data)
    assert suggestions(other) == suggestions(data)


@pytest.mark.parametrize(("everywhere", "words"), [(1, "**yes**"), (-1, "**no, they decrease**"), (0, "**not shown**")])
def test_duplicates_increase_only_if_the_interval_over_images_excludes_0(
    data: ReportData, inputs: ReportInputs, everywhere: int, words: str
) -> None:
    rows = copy.deepcopy(data.per_image)
    rows["stage1-control"]["dup_pairs_90"] = 5
    rows["stage2"]["dup_pairs_90"] = 5 + everywhere
    if not everywhere:  # one image alone moves the mean, and proves nothing
        rows["stage2"].iloc[0, rows["stage2"].columns.get_loc("dup_pairs_90")] += 3
    other = dataclasses.replace(data, per_image=rows)
    assert words in answer(other, "duplicates")
    assert ("duplicates increase" in {s.rule for s in suggestions(other)}) == (words == "**yes**")


@pytest.mark.parametrize(
    ("headroom", "bounds", "perfect", "words"),
    [
        (0.05, [0.04, 0.06], 0.5, "**could be better**"),
        (0.03, [0.02, 0.04], 0.5, "**not shown**"),
        (0.01, [0.0, 0.02], 0.5, "**yes**"),
        (0.0002, [0.0, 0.0004], 0.0003, "**not shown**"),  # almost no object is found, so there is nothing to rank
        (None, None, None, "not defined on this data"),
    ],
)
def test_the_score_ranks_well_only_with_an_interval_and_enough_map_to_rank(
    data: ReportData, inputs: ReportInputs, headroom: Any, bounds: Any, perfect: Any, words: str
) -> None:
    metrics = copy.deepcopy(data.metrics)
    metrics.at["confidence.headroom_mAP", "stage2"] = headroom
    metrics.at["confidence.perfect_ranking_mAP", "stage2"] = perfect
    metrics.at["interval.confidence.headroom_mAP", "stage2"] = bounds
    assert words in answer(dataclasses.replace(data, metrics=metrics), "rank well")


def test_every_comparison_lists_what_improved_and_what_shows_no_difference(data: ReportData) -> None:
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
    forgotten = [row | {"A1": [a + 50 for a in row["A1"]]} for row in data.contexts["stage2"]]
    data = dataclasses.replace(data, per_image=per_image, contexts=data.contexts | {"stage2": forgotten})
    commands = set()
    for lo, hi in ((-0.03, -0.01), (-0.01, 0.03)):
        other = with_difference(dataclasses.replace(data, metrics=metrics), lo, hi)
        commands |= {s.command for s in suggestions(other)}
    assert len(commands) == 8
    for command in commands - {"coordexp answer score"}:
        assert plan_study(grid_study([command.split(" ")[3]], command), repository).seed_keys


def test_a_sentence_replaces_the_table_if_no_rule_fires() -> None:
    assert suggestions_table([]) == "No rule suggests an experiment."
