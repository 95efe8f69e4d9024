"""Stages under faults of the disk and signals at single operations: a few here, all by `make test-faults`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fault_lab import MEANINGS, OUTCOMES, Ended, Found, Lab, divide, read_results, report
from fault_shim import FAULTS, Fault, Shim

FEW = ("convert", "pack")


@pytest.mark.slow
def test_after_a_fault_a_stage_is_run_again_to_the_same_bytes(repository: Path, tmp_path: Path) -> None:
    """One operation of each kind for each fault, in two stages: every fault is reported, and nothing is lost."""
    paths = os.pathsep.join(str(repository / folder) for folder in ("src", "", "tests"))
    asked = ["--stages", *FEW, "--sample", "1", "--results", str(tmp_path), "--report", str(tmp_path / "faults.md")]
    done = subprocess.run(
        [sys.executable, "-m", "fault_lab", *asked],
        cwd=repository, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (kept,) = tmp_path.glob("faults-*.jsonl")
    found = [Found(**json.loads(line)) for line in kept.read_text().splitlines()]
    ways = sum(map(len, FAULTS.values()))
    assert Counter(one.stage for one in found) == dict.fromkeys(FEW, ways)
    assert Counter(one.outcome for one in found) == {"killed": 3 * len(FEW), "named": (ways - 3) * len(FEW)}
    assert "Nothing went wrong." in (tmp_path / "faults.md").read_text()


def shim(tmp_path: Path, fault: Fault | None) -> Shim:
    return Shim(str(tmp_path), fault)


def test_the_chosen_operation_fails_once_or_from_then_on(tmp_path: Path) -> None:
    for what, later in (("EIO", False), ("ENOSPC", True)):
        met: list[str] = []
        one = Shim(str(tmp_path), Fault("write", 2, what), met.append)
        failed = []
        for kind in ("write", "read", "write", "write"):
            try:
                one.meet(kind, str(tmp_path / "a"))
            except OSError:
                failed.append(len(one.places))
        assert failed == ([3, 4] if later else [3])
        assert met == ["a"]


def test_a_signal_comes_at_the_chosen_operation(tmp_path: Path) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        one = shim(tmp_path, Fault("rename", 1, "SIGTERM"))
        one.meet("write", str(tmp_path / "a"))
        assert came == []
        one.meet("rename", str(tmp_path / "a"))
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_files_of_the_workspace_count(tmp_path: Path) -> None:
    one = shim(tmp_path / "space", None)
    inside = ("a", "data/a", "runs/x/../a", "source/a")
    assert [one.holds(str(tmp_path / "space" / path)) for path in inside] == [True] * 4
    outside = (tmp_path / "a", tmp_path / "spaces" / "a", tmp_path / "space" / "src" / "a.py", "/proc/self/stat", "")
    assert [one.holds(str(path)) for path in outside] == [False] * 5


NAMED = "error: a/b: cannot be written: No space left on device."
TRACEBACK = "Traceback (most recent call last):\nOSError"


@pytest.mark.parametrize(
    ("what", "code", "output", "is_right", "outcome"),  # outputs of a run that ended well
    [
        ("ENOSPC", 2, NAMED, False, "named"),
        ("SIGINT", 75, "interrupted: stopped by a signal.", False, "named"),
        ("ENOSPC", 1, TRACEBACK, False, "traceback"),
        ("ENOSPC", 2, f"{NAMED}\n{TRACEBACK}", False, "traceback"),
        ("ENOSPC", 0, "", True, "unharmed"),
        ("ENOSPC", 0, "", False, "silent"),
        ("ENOSPC", None, "", False, "hung"),
        ("SIGKILL", -9, "", False, "killed"),
        ("ENOSPC", -11, "", False, "traceback"),
        ("SIGKILL", -9, "left", False, "lingering"),
        ("SIGKILL", 0, "", None, "unmet"),
    ],
)
@pytest.mark.parametrize("second", ["right", "fails", "other"])
def test_the_outcome_of_a_fault_is_determined_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    what: str, code: int | None, output: str, is_right: bool | None, outcome: str, second: str,
) -> None:  # fmt: skip
    """The stages only write one line, and leave files of their own."""
    lab, out, met = Lab(tmp_path), "data/smoke/packed", "" if is_right is None else "b"
    lab._made, lab._before = {"pack": f"{out}=right"}, {"pack": tmp_path / "before"}
    lab.operations = {"pack": [("read", "a"), ("write", "b")]}
    (tmp_path / "before").mkdir()
    ends = [Ended(code, output, met, [], int(output == "left")), Ended(2 if second == "fails" else 0, "", "", [])]
    contents = iter(
        (["right" if is_right else "none"] if code == 0 and met else []) + ["other" if second == "other" else "right"]
    )

    def run(_: Lab, space: Path, *_more: object) -> Ended:
        (space / "left").touch()
        return ends.pop(0)

    monkeypatch.setattr(Lab, "run", run)
    monkeypatch.setattr(Lab, "_content", lambda *_: f"{out}={next(contents)}")
    found = lab.attempt("pack", Fault("write", 1, what))
    expected = outcome if second == "right" or outcome in ("silent", "hung", "lingering") else "lost"
    assert (found.where, found.outcome) == (met, expected)


def test_a_second_run_is_repeated_only_if_its_start_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, runs = Lab(tmp_path), list[str]()
    lab._made, lab._before = {"pack": "right"}, {"pack": tmp_path / "before"}
    lab.operations = {"pack": [("write", "a")] * 4}
    (tmp_path / "before" / ".resume").mkdir(parents=True)
    leaves = {1: None, 2: "a", 3: "b", 4: "a"}  # what the fault at each write leaves in a file

    def run(_: Lab, space: Path, stage: str, fault: Fault | None = None) -> Ended:
        runs.append("again" if fault is None else "hit")
        (space / ".resume" / "lock").write_text(f"{len(runs)}")
        if fault and (text := leaves[fault.number]):
            (space / "left").write_text(text)
        return Ended(0, "", "", []) if fault is None else Ended(2, NAMED, "a", [])

    monkeypatch.setattr(Lab, "run", run)
    monkeypatch.setattr(Lab, "_content", lambda *_: "right")
    (tmp_path / "before" / ".resume" / "lock").touch()
    assert {lab.attempt("pack", Fault("write", n, "ENOSPC")).outcome for n in leaves} == {"named"}
    assert runs == ["hit", "hit", "again", "hit", "again", "hit"]


def test_processes_divide_the_places_and_one_that_fails_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(_: Lab, stage: str, fault: Fault) -> Found:
        assert fault.number < 6
        return Found(stage, fault.kind, fault.number, fault.what, "a", "named", NAMED)

    monkeypatch.setattr(Lab, "attempt", attempt)
    places = [("pack", Fault("write", number, "ENOSPC")) for number in range(1, 7)]
    divide(Lab(tmp_path), places[:5], 2, 60.0, tmp_path / "found")
    assert sorted(found.number for found in read_results(tmp_path / "found")) == [1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="1 of 2 processes"):
        divide(Lab(tmp_path), places[4:], 2, 60.0, tmp_path / "found")
    divide(Lab(tmp_path), places, 2, 0.0, tmp_path / "none")
    assert read_results(tmp_path / "none") == []


def test_places_are_complete_or_evenly_spread(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.operations = {"pack": [("write", "a")] * 10}
    assert len(list(lab.faults("pack"))) == 10 * len(FAULTS["write"])
    assert [f.number for f in lab.faults("pack", 3) if f.what == "ENOSPC"] == [2, 6, 9]
    assert list(lab.faults("pack", 3, ("read",))) == []


def test_the_report_counts_places_and_lists_failures() -> None:
    right = Found("pack", "write", 1, "ENOSPC", "a", "named", "error: a")
    lost = Found("pack", "write", 2, "SIGKILL", "data/x|y", "lost", "error: @b")
    text = report([right, lost], {"pack": 5, "raw": 3})
    assert "| pack | 5 | 2 | 0 | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "| all | 8 | 2 | 0 | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "- pack, write 2 (data/x\\|y), SIGKILL: lost: `error: @b`" in text
    assert "Nothing went wrong" in report([right], {"pack": 5})
    assert set(MEANINGS) == set(OUTCOMES)
