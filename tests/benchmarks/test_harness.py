"""The harness: rows survive their file, tables say what is missing, clocks compare what ran side by side."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks.harness import Figure, OtherLoad, Row, Times, cpu_seconds, measured, run_child, side_by_side, unmeasured

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


def test_the_file_describes_the_machine_without_personal_data(tmp_path):
    harness.save("plan", ROWS, tmp_path)
    described = json.loads((tmp_path / "plan.json").read_text())["machine"]
    assert {"cores", "cpu", "memory_gib", "python", "torch"} <= described.keys()
    assert str(tmp_path) not in json.dumps(described)


def test_the_table_shows_missed_targets_and_unmeasured_figures():
    _, _, fill, time, step = harness.table(ROWS).splitlines()
    assert fill.endswith("yes")
    assert time.endswith("NO")
    assert "needs CUDA" in step


def test_a_ratio_is_the_median_of_rounds_in_which_both_ran():
    times = Times({"slow": [4.0, 40.0, 9.0], "fast": [2.0, 10.0, 3.0]}, {"slow": [4.0, 4.0, 4.0], "fast": [1.0] * 3})
    assert times.ratio("slow", "fast").value == 3.0
    assert times.ratio("slow", "fast").by_cpu.value == 4.0
    assert times.of("slow").value == 9.0


def test_a_row_says_median_spread_processor_time_and_whether_the_limit_holds():
    seconds = Figure([2.0, 1.0, 6.0], [1.5, 0.5, 1.0])
    row = measured("step", seconds, "s", at_most=1.5)
    assert (row.value, row.low, row.high, row.cpu) == (2.0, 1.0, 6.0, 1.0)
    assert (row.target, row.met) == ("<= 1.5 s", False)
    assert measured("step", seconds.map(lambda s: 10 / s), "a second", at_least=50_000).target == ">= 50,000 a second"
    once = measured("fill", 0.5, "", at_least=0.4)
    assert (once.low, once.cpu, once.met) == (None, None, True)
    assert "1 - 6" in harness.table([row])


def test_sleeping_takes_no_processor_time():
    times = side_by_side({"sleeps": lambda: time.sleep(0.2), "works": lambda: sum(range(3_000_000))}, 1, False)
    assert times.of("sleeps").value >= 0.2
    assert times.of("sleeps").by_cpu.value < 0.02
    assert times.of("works").by_cpu.value > 0.02


def test_work_of_others_is_what_the_machine_did_less_our_own(tmp_path, monkeypatch):
    wall_own_machine = iter([(0.0, 0.0, 0.0), (1.0, 0.2, 1.5), (1.0, 0.2, 1.5), (3.0, 1.2, 2.9), (3.0, 1.2, 2.9)])
    monkeypatch.setattr(harness, "_clocks", lambda: next(wall_own_machine))
    load = OtherLoad(0.0)
    assert (load.before, load.during) == (pytest.approx(1.3), pytest.approx(0.2))
    harness.save("plan", ROWS, tmp_path, load)
    described = json.loads((tmp_path / "plan.json").read_text())["machine"]["cores_of_others"]
    assert described == {"before": pytest.approx(1.3), "during": pytest.approx(0.2)}


def test_child_processes_do_not_count_as_other_load():
    before = cpu_seconds()
    run_child([sys.executable, "-c", "sum(range(10_000_000))"])
    assert cpu_seconds() - before > 0.05


def test_contestants_take_turns():
    order = []
    times = side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warm_up=False)
    assert order == ["a", "b", "a", "b"]
    assert len(times.wall["a"]) == len(times.cpu["b"]) == 2


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
    """Alone 1 s, beside 2 and 6 processes 3 s: on two cores fair shares would make that 3 and 7 s."""
    crowd: list[int] = []

    @contextmanager
    def busy(count: int) -> Iterator[None]:
        crowd.append(count)
        yield

    monkeypatch.setattr(spinning, "busy", busy)
    monkeypatch.setattr(spinning, "machine", lambda: {"cores": 2})
    monkeypatch.setattr(spinning, "seconds_per_sample", lambda *_: (3.0, 3.0) if crowd[-1] else (1.0, 1.0))
    monkeypatch.setattr(spinning.tiny_run, "open_run", lambda _: SimpleNamespace(paths=ProfilePaths("tiny", Path())))
    monkeypatch.setattr(spinning.tiny_run, "absent", lambda *_: [])
    asked = argparse.Namespace(quick=False, busy="6,0,2", ways="bounded", rounds=2)
    found = {row.name: (row.value, row.met) for row in spinning.measure(asked)}
    assert found == {
        "crowded step: 2 busy processes on 2 cores": (pytest.approx(1.0), True),
        "crowded step: 6 busy processes on 2 cores": (pytest.approx(3 / 7), True),
    }


def test_every_benchmark_has_its_minutes_and_all_take_less_than_the_limit():
    assert list(runner.MINUTES) == runner.scripts()
    assert sum(runner.MINUTES.values()) < runner.LIMIT_MINUTES
