"""The eval table per checkpoint and per eval step: true numbers, and a reason where there is none."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coordexp.config.paths import CHECKPOINTS
from coordexp.errors import DataError
from coordexp.reporting.answers import last_reading
from coordexp.reporting.inputs import TRAINED, ReportInputs, load_report_data
from coordexp.reporting.monitor import monitor_sentence, monitor_table, write_monitor_figure
from reporting.test_report import rows_of

KEYS = (
    "f1",
    "precision",
    "recall",
    "predictions",
    "right",
    "false",
    "missed",
    "dup_pairs_90",
    "parse_rate",
    "truncated",
)


def test_every_evaluation_is_a_row_with_the_numbers_of_its_file(inputs: ReportInputs, text: str) -> None:
    shown = rows_of(text, "stage")
    expected = [
        (stage, json.loads(line))
        for stage in TRAINED
        for line in (inputs.runs / stage / "monitor.jsonl").read_text().splitlines()
    ]
    assert len(shown) == len(expected) == 12
    for row, (stage, found) in zip(shown, expected, strict=True):
        assert row[:2] == [stage, str(found["step"])]
        assert [float(cell) for cell in row[2:12]] == pytest.approx([found[key] for key in KEYS], abs=5e-5)


def test_the_counts_of_the_checkpoints_are_those_of_metrics_json(text: str, metrics: dict[str, Any]) -> None:
    rows = {row[0]: row[1:] for row in rows_of(text, "checkpoint") if len(row) == 12}
    assert tuple(rows) == CHECKPOINTS
    for name, cells in rows.items():
        areas = metrics[name]["eval"]
        assert float(cells[0]) == areas["coco"]["mAP"]
        assert [int(cell) for cell in cells[4:8]] == [
            areas["coco"]["n_pred"],
            *(areas["f1"][key] for key in ("tp_50", "fp_50", "fn_50")),
        ]


def test_the_sentence_gives_the_precision_of_one_evaluation(inputs: ReportInputs) -> None:
    sentence = monitor_sentence(load_report_data(inputs).dev_rows)
    assert "16 dev images with 44 objects" in sentence
    assert "±0.15" in sentence  # 1.96 * sqrt(0.25 / 44)


@pytest.mark.parametrize(("left", "words"), [(None, "wrote no `monitor.jsonl`"), ([], "`monitor.every_steps`")])
def test_without_evaluations_the_report_gives_the_reason(
    inputs: ReportInputs, left: list | None, words: str, tmp_path: Path
) -> None:
    rows = dict.fromkeys(TRAINED, left)
    assert words in monitor_sentence(rows)
    assert monitor_table(rows) == ""
    data = dataclasses.replace(load_report_data(inputs), dev_rows=rows)
    write_monitor_figure(data, tmp_path / "monitor.png")
    assert not list(tmp_path.iterdir())


def test_missing_readings_have_no_panel(inputs: ReportInputs, tmp_path: Path) -> None:
    data = load_report_data(inputs)
    heights = []
    for contexts in (data.contexts, dict.fromkeys(TRAINED)):
        write_monitor_figure(dataclasses.replace(data, contexts=contexts), tmp_path / "monitor.png")
        with Image.open(tmp_path / "monitor.png") as picture:
            heights.append(picture.height)
    assert heights[0] > heights[1]


def test_means_by_context_have_an_interval_over_images(inputs: ReportInputs, text: str) -> None:
    data = load_report_data(inputs)
    rows = rows_of(text, "read after")
    assert [row[:2] for row in rows] == [[s, str(r["step"])] for s in TRAINED for r in data.dev_rows[s] or ()]
    [last] = [row for row in rows if row[0] == "stage2"][-1:]
    assert last[2:4] == ["16", "48"]
    errors = [error for row in list(last_reading(data, "stage2").values()) for error in row["A1"]]
    mean, low, high = (float(n) for n in re.findall(r"[\d.]+", last[4]))
    assert mean == pytest.approx(np.mean(errors), abs=0.05)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(errors) / len(errors) ** 0.5, rel=0.5)
    assert last[6] == "32"  # of the 48 objects, those in own answers


def test_a_broken_file_of_rows_is_named(inputs: ReportInputs, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(inputs.runs, runs, ignore=shutil.ignore_patterns("eval"))
    file = runs / "stage2" / "monitor.jsonl"
    lines = file.read_text().splitlines()
    for broken, words in ((lines[1][:30], "not valid JSON"), ('{"step": 3}', "lacks dup_pairs_90, f1,")):
        file.write_text("\n".join([lines[0], broken]))
        with pytest.raises(DataError, match=f"monitor.jsonl:2: {words}"):
            load_report_data(dataclasses.replace(inputs, runs=runs))
