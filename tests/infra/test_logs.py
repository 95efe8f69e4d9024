"""Logs as tables: rows may have different columns, invalid rows are errors, smoothing adds no artifacts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coordexp.errors import DataError
from coordexp.infra.logs import ends, logged, read_log, read_rows, smoothed


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_column_that_a_row_does_not_log_is_nan(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "channel": "A", "loss/total": 3.0, "loss/zzz": 1.0},
        {"step": 1, "channel": "B", "loss/total": 2.0, "loss/softce": 1.5},
        {"step": 2, "channel": "A", "loss/total": 1.0, "loss/zzz": 0.5},
    ]
    log = read_log(write(tmp_path / "log.jsonl", rows))
    assert list(log) == ["channel", "loss/total", "loss/zzz", "loss/softce"], "the order in which they were logged"
    assert logged(log, "loss/softce").to_dict() == {1: 1.5}
    assert (ends(log, "loss/total"), ends(log, "loss/zzz"), ends(log, "nothing")) == ((3.0, 1.0), (1.0, 0.5), None)
    assert logged(log, "nothing").empty


def test_ends_are_means_of_a_tenth(tmp_path: Path) -> None:
    log = read_log(write(tmp_path / "log.jsonl", [{"step": s, "x": float(s)} for s in range(40)]))
    assert ends(log, "x") == (1.5, 37.5)


@pytest.mark.parametrize("line", ['{"loss/total": 1}', "[1]", '{"step": 1.5}'])
def test_a_row_without_a_step_is_an_error_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"log\.jsonl:2: expected a JSON object with an integer `step`"):
        read_log(path)


def test_a_truncated_line_is_an_error_unless_the_file_is_growing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "los', encoding="utf-8")
    assert read_rows(path, growing=True) == [{"step": 0}]
    with pytest.raises(DataError, match=r"log\.jsonl:2: not valid JSON"):
        read_rows(path)
    with pytest.raises(DataError, match=r"log\.jsonl:1: lacks f1, seconds"):
        read_rows(path, frozenset({"seconds", "f1"}), growing=True)


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the log is empty"):
        read_log(write(tmp_path / "log.jsonl", []))


def test_smoothing_removes_spikes_and_its_window_shrinks_at_the_ends() -> None:
    values = pd.Series(np.linspace(0.0, 1.0, 23) ** 2)
    expected = [values[max(0, i - 3) : i + 4].mean() for i in range(23)]
    np.testing.assert_allclose(smoothed(values, 7)[4:-4], expected[4:-4], atol=1e-12)
    np.testing.assert_allclose(smoothed(values, 7), expected, atol=0.02)
    assert smoothed(pd.Series([0.0] * 9 + [100.0] + [0.0] * 9), 7).max() == 0
    np.testing.assert_allclose(smoothed(pd.Series(np.full(9, 2.5)), 5), 2.5)


def test_pandas_is_loaded_only_with_the_first_log(repository: Path) -> None:
    script = "import sys, coordexp.infra.logs, coordexp.cli; assert 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": str(repository / "src")}, check=True)
