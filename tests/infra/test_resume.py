"""Folders of `.resume`: locks, waiting processes, remaining state, and the marks for scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from coordexp import cli
from coordexp.errors import BusyError, DataError, Interrupted
from coordexp.infra import resume
from coordexp.infra.files import write_text
from coordexp.infra.resume import MARK, clean, finish, holding, is_held, keep_within_budget, kept, mark

SOURCE = str(Path(__file__).parents[2] / "src")
HOLD = (
    "import sys, time; from pathlib import Path; from coordexp.infra.resume import holding\n"
    "with holding(Path(sys.argv[1]), 'stage1'):\n    print('held', flush=True); time.sleep(60)\n"
)


def holder_of(folder: Path) -> subprocess.Popen[str]:
    """Start a process, and wait until it holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env={"PYTHONPATH": SOURCE}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_learns_which_process_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "stage1-ff"
    with holder_of(folder) as process:
        words = rf"in use by process {process.pid} on .* \(stage1, since 20"
        with pytest.raises(BusyError, match=words), holding(folder, "x", waits=False):
            pass
        assert is_held(folder)
        assert [one.state for one in kept(tmp_path)] == [f"in use by {resume.holder(folder)}"]
        assert clean(tmp_path, 0) == []
        process.send_signal(signal.SIGKILL)
    with holding(folder, "x", waits=False):
        pass
    assert not is_held(folder)


def test_a_second_process_waits_and_finds_what_the_first_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "POLL_S", 0.01)
    folder, done = tmp_path / "generations-ff", []

    def work(name: str) -> None:
        with holding(folder, name):
            answers = folder / "answers"
            done.append((name, answers.read_text() if answers.exists() else ""))
            write_text(answers, f"by {name}")
            if name == "first":
                begun.set()
                while not (folder / resume.WAITING).exists():
                    time.sleep(0.01)
                time.sleep(0.2)
            finish(folder)

    begun = threading.Event()
    first, second = (threading.Thread(target=work, args=(name,)) for name in ("first", "second"))
    first.start()
    begun.wait()
    second.start()
    for thread in (first, second):
        thread.join(30)
    assert done == [("first", ""), ("second", "by first")]
    assert not folder.exists()


def test_concurrent_processes_work_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are created and removed while processes wait for them."""
    monkeypatch.setattr(resume, "POLL_S", 0.001)
    inside, most, turns = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, turns
        for _ in range(15):
            with holding(tmp_path / "a-1", "x"):
                inside += 1
                most, turns = max(most, inside), turns + 1
                inside -= 1
                finish(tmp_path / "a-1")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, turns) == (1, 60)


def test_a_folder_that_vanishes_while_it_is_created_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mkdir, calls = tmp_path / "stage1-ff", os.mkdir, []

    def removed_in_between(path: Path, mode: int = 0o777) -> None:
        calls.append(path)
        if len(calls) == 2:  # the first call is for the parent
            raise FileExistsError(path)  # it was there, and is not any more
        mkdir(path, mode)

    monkeypatch.setattr(resume, "POLL_S", 0.001)
    monkeypatch.setattr(os, "mkdir", removed_in_between)
    with holding(folder, "x"):
        assert is_held(folder)
    assert calls[1] == calls[-1] == folder


@pytest.mark.parametrize(
    ("error", "goes_on"), [(Interrupted("a signal"), True), (KeyboardInterrupt(), True), (DataError("a fault"), False)]
)
def test_the_mark_means_that_nothing_must_be_fixed_first(tmp_path: Path, error: BaseException, goes_on: bool) -> None:
    folder = tmp_path / "stage1-ff"

    def work() -> None:
        with holding(folder, "x"):
            write_text(folder / "state", "half")
            mark(folder)
            raise error

    with pytest.raises(type(error)):
        work()
    assert (folder / MARK).exists() == goes_on
    assert (folder / "state").exists()
    assert [(one.can_go_on, one.is_empty) for one in kept(tmp_path)] == [(goes_on, False)]


def test_the_mark_survives_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "stage1-ff"
    with holder_of(folder) as process:
        mark(folder)
        process.send_signal(signal.SIGKILL)
    assert [one.state for one in kept(tmp_path)] == ["empty"]
    write_text(folder / "state", "half")
    assert [one.state for one in kept(tmp_path)] == ["can resume"]


def aged(root: Path, name: str, days: float, n_bytes: int, marked: bool) -> Path:
    """A folder that is not in use."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(bytes(n_bytes))
    if marked:
        mark(folder)
    for path in folder.iterdir():
        os.utime(path, (time.time() - days * 86400,) * 2)
    return folder


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_old_or_empty_folders_are_cleaned_up(tmp_path: Path) -> None:
    aged(tmp_path, "stage1-old", 20, 10, True)
    aged(tmp_path, "stage1-new", 2, 10, False)
    aged(tmp_path, "generations-empty", 0.01, 0, False)
    (tmp_path / ".model-digests.json").write_text("{}")
    assert sorted(one.folder.name for one in clean(tmp_path, 14)) == ["generations-empty", "stage1-old"]
    assert names(tmp_path) == [".model-digests.json", "stage1-new"]
    clean(tmp_path, 0)
    assert names(tmp_path) == [".model-digests.json"]


@pytest.mark.parametrize(
    ("budget_mb", "left"), [(9, ["a-1", "b-1", "c-1", "d-1"]), (3.5, ["b-1", "c-1", "d-1"]), (0, ["b-1"])]
)
def test_the_budget_removes_the_oldest_folder_that_cannot_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_mb: float, left: list[str]
) -> None:
    monkeypatch.setenv(resume.BUDGET_VARIABLE, str(budget_mb / 1000))
    for name, days, marked in (("a-1", 4, False), ("b-1", 3, True), ("c-1", 2, False), ("d-1", 1, False)):
        aged(tmp_path, name, days, 10**6, marked)
    keep_within_budget(tmp_path)
    assert names(tmp_path) == left


def stopped(code: str, number: signal.Signals, tmp_path: Path, times: int = 1) -> tuple[int, str]:
    """Exit code and stderr of a process that receives a signal when it is ready."""
    env = {"PYTHONPATH": f"{SOURCE}{os.pathsep}{Path(SOURCE).parent}", "DVC_ROOT": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(times):
            assert process.stdout.readline() == "now\n"
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


IMPORTING = "import sys, time; sys.argv[0] = '-m'; import pipelines\nprint('now', flush=True); time.sleep(60)\n"
WORKING = (
    "import time; from coordexp.stage import stage_main\n"
    "def run(context):\n{body}\n"
    "import coordexp.stage as s; s._context = lambda args, stage: None; s._run_recorded = lambda run, args: run(None)\n"
    "raise SystemExit(stage_main(run, []))\n"
)
SLEEPS = "    print('now', flush=True); time.sleep(60)"
CLOSES_SLOWLY = (
    "    try:\n        print('now', flush=True); time.sleep(60)\n"
    "    finally:\n        print('now', flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (IMPORTING, "interrupted: ended at once by signal"),
        (WORKING.format(body=SLEEPS), "interrupted: stopped by a signal"),
    ],
)
def test_a_signal_ends_a_stage_with_75_and_a_mark(
    tmp_path: Path, number: signal.Signals, code: str, words: str
) -> None:
    returned, said = stopped(code, number, tmp_path)
    assert (returned, words in said) == (75, True), said
    assert (tmp_path / ".resume" / MARK).is_file()


def test_a_second_ctrl_c_ends_a_slow_shutdown(tmp_path: Path) -> None:
    returned, said = stopped(WORKING.format(body=CLOSES_SLOWLY), signal.SIGINT, tmp_path, 2)
    assert (returned, "ended at once by signal 2" in said) == (75, True), said


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + IMPORTING.replace("60", "1")
    assert stopped(code, signal.SIGINT, tmp_path) == (0, "")


def test_the_command_lists_and_cleans_saved_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["runs", "--state", *arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert said() == "no saved states\n"
    aged(tmp_path / ".resume", "stage1-old", 20, 2_000_000, False)
    aged(tmp_path / ".resume", "stage2-new", 0.01, 1_000_000, True)
    lines = said().splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["stage1-old", "2"], ["stage2-new", "1"]]
    assert lines[2].endswith("stopped by an error, or a cache")
    assert lines[3].endswith("can resume")
    assert lines[4] == "1 can be resumed: run the same command again."
    assert "removed: stage1-old, 2.0 MB" in said("--clean")
    assert names(tmp_path / ".resume") == ["stage2-new"]
