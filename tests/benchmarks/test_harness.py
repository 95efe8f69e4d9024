"""The harness: rows survive their file, tables say what is missing, clocks compare what ran side by side."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks.harness import Row, Times, run_child, side_by_side, unmeasured

from benchmarks import __main__ as runner
from benchmarks import harness, spinning
from coordexp.config.paths import ProfilePaths

ROWS = [
    Row("fill", 0.99803, "", "7,228 packs", ">= 0.995", True),
    Row("time", 12345.6, "s", "", "< 2 s", False),
    unmeasured("step", "needs CUDA"),
]


def test_rows_survive_their_file(tmp_path, capsys):
    harness.save("plan", ROWS, tmp_path)
    assert harness.load("plan", tmp_path) == ROWS
    assert "12,346" in capsys.readouterr().out


def test_numbers_of_numpy_are_numbers_of_the_file(tmp_path):
    harness.save("plan", [Row("fill", np.float64(0.5), "", "", "", np.bool_(True))], tmp_path)
    assert harness.load("plan", tmp_path) == [Row("fill", 0.5, "", "", "", True)]


def test_the_file_describes_the_machine_and_nobody(tmp_path):
    harness.save("plan", ROWS, tmp_path)
    described = json.loads((tmp_path / "plan.json").read_text())["machine"]
    assert {"cores", "cpu", "memory_gib", "python", "torch"} <= described.keys() <= {*described, "gpu"}
    assert str(tmp_path) not in json.dumps(described)


def test_the_table_shows_misses_and_what_could_not_be_measured():
    _, _, fill, time, step = harness.table(ROWS).splitlines()
    assert fill.endswith("yes")
    assert time.endswith("NO")
    assert "needs CUDA" in step


def test_a_ratio_is_the_median_of_rounds_in_which_both_ran():
    times = Times({"slow": [4.0, 40.0, 9.0], "fast": [2.0, 10.0, 3.0]})
    assert times.ratio("slow", "fast") == 3.0
    assert times.of("slow") == 9.0


def test_contestants_take_turns():
    order = []
    times = side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warm_up=False)
    assert order == ["a", "b", "a", "b"]
    assert len(times.seconds["a"]) == len(times.seconds["b"]) == 2


def test_the_peak_memory_of_a_child_is_its_own():
    small = run_child([sys.executable, "-c", "print('here')"])
    large = run_child([sys.executable, "-c", "b = bytearray(200 * 2**20)"])
    assert small.output == "here\n"
    assert large.peak_gib - small.peak_gib == pytest.approx(200 / 1024, abs=0.02)


def test_a_child_that_fails_is_an_error_unless_allowed():
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(subprocess.CalledProcessError):
        run_child(command)
    assert run_child(command, allowed=(0, 3)).code == 3


def test_a_broken_benchmark_is_a_row_and_the_others_still_run(tmp_path, monkeypatch, capsys):
    def run(name: str, options: list[str]) -> bool:
        if name == "startup":
            return False
        harness.save(name, [Row(f"figure of {name}", 1.0, "", "", "", None)], tmp_path)
        return True

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "startup", "packing_plan", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runner.main()
    shown = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "broke; see above" in shown
    assert "figure of packing_plan" in shown


def test_a_crowded_step_is_compared_with_its_fair_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone 1 s, beside 2 and 6 processes 3 s: on two cores a fair share would make that 2 and 4."""
    crowd: list[int] = []

    @contextmanager
    def busy(count: int) -> Iterator[None]:
        crowd.append(count)
        yield

    monkeypatch.setattr(spinning, "busy", busy)
    monkeypatch.setattr(spinning, "machine", lambda: {"cores": 2})
    monkeypatch.setattr(spinning, "seconds_per_sample", lambda *_: 3.0 if crowd[-1] else 1.0)
    monkeypatch.setattr(spinning.tiny_run, "open_run", lambda _: SimpleNamespace(paths=ProfilePaths("tiny", Path())))
    monkeypatch.setattr(spinning.tiny_run, "absent", lambda *_: [])
    asked = argparse.Namespace(quick=False, busy="6,0,2", ways="bounded", rounds=2)
    found = {row.name: (row.value, row.met) for row in spinning.measure(asked)}
    assert found == {
        "crowded step: 2 busy processes on 2 cores": (1.5, True),
        "crowded step: 6 busy processes on 2 cores": (0.75, True),
    }
