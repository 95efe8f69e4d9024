"""The tables that `dvc plots` draws."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

from coordexp.reporting.curves import write_curves
from coordexp.reporting.inputs import ReportInputs


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def test_curves_repeat_the_logs(inputs: ReportInputs, tmp_path: Path) -> None:
    paths = {path.name: read(path) for path in write_curves(inputs, tmp_path)}
    assert set(paths) == {"stage1_loss.tsv", "stage2_loss.tsv", "coord_diag.tsv", "pr_50.tsv"}
    log = [json.loads(line) for line in (inputs.runs / "stage2" / "train_log.jsonl").open(encoding="utf-8")]
    rows = paths["stage2_loss.tsv"]
    assert [row["channel"] for row in rows] == [row["channel"] for row in log]
    for row, logged in zip(rows, log, strict=True):
        assert int(row["step"]) == logged["step"]
        for name in (key for key in logged if key.startswith("loss/")):
            assert abs(float(row[name]) / logged[name] - 1) < 1e-5
    assert "channel" not in paths["stage1_loss.tsv"][0]
    assert {row["stage"] for row in paths["coord_diag.tsv"]} == {"stage1", "stage1-control", "stage2"}


def test_precision_recall_points_are_those_of_the_evaluation(inputs: ReportInputs, tmp_path: Path) -> None:
    rows = read(write_curves(inputs, tmp_path)[-1])
    curve = json.loads((inputs.evaluations / "stage1" / "pr_curve.json").read_text(encoding="utf-8"))
    mine = [(float(r["recall"]), float(r["precision"])) for r in rows if r["checkpoint"] == "stage1"]
    assert mine == list(zip(curve["recall"], curve["precision_50"], strict=True))


def test_what_a_row_does_not_log_is_empty(inputs: ReportInputs, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for stage in ("stage1", "stage1-control", "stage2"):
        (runs / stage).mkdir(parents=True)
        (runs / stage / "train_log.jsonl").write_text('{"step": 0, "loss/a": 1.5}\n{"step": 1, "loss/b": 2}\n')
    first = write_curves(dataclasses.replace(inputs, runs=runs), tmp_path / "out")[0]
    assert first.read_text() == "step\tloss/a\tloss/b\n0\t1.5\t\n1\t\t2\n"
