"""The frame around a stage: exit codes, messages, the memory allocator."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coordexp.config.loading import load_profile
from coordexp.config.run import RunConfig
from coordexp.errors import BusyError, CheckpointError, ConfigError, DataError, Interrupted, TrainingError
from coordexp.infra.provenance import git_state
from coordexp.reporting.provenance import BASELINE_VARIABLE, experiment_baseline
from coordexp.stage import stage_main, tune_allocator

ON_GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.fixture
def params_file(tmp_path: Path, repository: Path) -> Path:
    shutil.copytree(repository / "configs", tmp_path / "configs")
    return Path(shutil.copy(repository / "params.yaml", tmp_path / "params.yaml"))


def failing(error: BaseException) -> Callable[[RunConfig], None]:
    def run(context: RunConfig) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "prefix"),
    [
        (ConfigError("sigma: found 0"), 2, "error: sigma: found 0"),
        (DataError("a.jsonl:3: no desc"), 2, "error: a.jsonl:3: no desc"),
        (CheckpointError("runs/x: no config.json"), 2, "error: runs/x: no config.json"),
        (TrainingError("the loss is not finite"), 1, "error: the loss is not finite"),
        (Interrupted("saved step 3 of 8"), 75, "interrupted: saved step 3 of 8"),
        (KeyboardInterrupt(), 75, "interrupted: stopped by a signal"),
        (BusyError("x: another process works in it"), 2, "error: x: another process works in it"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: a/b: cannot be written: No space left"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), 2, "error: a/b: cannot be written: Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "error: a/b: cannot be written: Permission"),
        (OSError(errno.EIO, "Input/output error"), 2, "error: an output of this stage: cannot be written: Input"),
    ],
)
def test_errors_that_a_user_can_fix_become_one_message(
    params_file: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, prefix: str
) -> None:
    assert stage_main(failing(error), ["--params", str(params_file)]) == code
    assert capsys.readouterr().err.startswith(prefix)


def test_sigterm_ends_a_stage_as_ctrl_c_does(params_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def run(context: RunConfig) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    assert stage_main(run, ["--params", str(params_file)]) == 75
    assert "run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_system_errors_keep_their_traceback(params_file: Path) -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory")
    with pytest.raises(FileNotFoundError):
        stage_main(failing(missing), ["--params", str(params_file)])


def test_without_git_a_stage_warns_and_continues(
    params_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "coordexp")
    monkeypatch.setenv("PATH", str(params_file.parent))
    said: list[str] = []
    assert stage_main(lambda context: said.append(caplog.text), ["--params", str(params_file)]) == 0
    assert "git is not installed" in said[0]
    assert git_state() == {"commit": None, "dirty": None}
    monkeypatch.setenv(BASELINE_VARIABLE, "HEAD")
    assert experiment_baseline("tiny") is None


def test_a_bug_keeps_its_traceback(params_file: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        stage_main(failing(ZeroDivisionError()), ["--params", str(params_file)])


def test_the_stage_gets_validated_parameters_and_paths(params_file: Path, tmp_path: Path) -> None:
    seen: list[RunConfig] = []
    code = stage_main(seen.append, ["--params", str(params_file), "--profile", "smoke", "--out", str(tmp_path / "out")])
    assert code == 0
    context = seen[0]
    assert context.params.profile == context.paths.profile == "smoke"
    assert context.profile == load_profile(tmp_path / "configs" / "smoke.yaml")
    assert context.paths.run("stage1") == tmp_path / "out" / "runs" / "smoke" / "stage1"
    assert context.paths.curve("stage2") == tmp_path / "out" / "reports" / "smoke" / "curves" / "stage2.tsv"


def test_without_a_profile_argument_the_parameter_file_decides(params_file: Path) -> None:
    params_file.write_text(re.sub(r"profile: \w+", "profile: smoke", params_file.read_text()))
    seen: list[RunConfig] = []
    assert stage_main(seen.append, ["--params", str(params_file)]) == 0
    assert seen[0].paths.profile == "smoke"


def test_an_invalid_value_stops_the_stage_before_it_runs(params_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params_file.write_text(re.sub(r"\nsoftce_weight: \S+", "\nsoftce_weight: high", params_file.read_text()))
    seen: list[RunConfig] = []
    assert stage_main(seen.append, ["--params", str(params_file)]) == 2
    assert seen == []
    assert "softce_weight: found 'high' (text), expected a number >= 0." in capsys.readouterr().err


def test_an_unknown_profile_suggests_the_closest_name(params_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage_main(lambda _: None, ["--params", str(params_file), "--profile", "smok"]) == 2
    assert "Did you mean 'smoke'?" in capsys.readouterr().err


def test_unknown_argument_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        stage_main(lambda _: None, ["--no-such-option"])
    assert caught.value.code == 2


def test_the_allocator_of_other_c_libraries_is_not_changed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    with caplog.at_level(logging.INFO):
        decision = tune_allocator(logging.getLogger("coordexp"))
    assert not decision.keeps_freed_memory
    assert caplog.messages == ["allocator: untouched (the C library is musl; the settings exist only in glibc)"]


@pytest.mark.skipif(not ON_GLIBC, reason="the settings exist only in glibc")
def test_allocator_settings_of_the_user_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "65536")
    decision = tune_allocator(logging.getLogger("coordexp"))
    assert not decision.keeps_freed_memory
    assert "MALLOC_TOP_PAD_" in decision.reason


# Large blocks are mapped one by one (and unmapped when freed) unless the allocator is configured to keep them.
MAPPED_BYTES = """
import ctypes, logging, sys
from coordexp.config.loading import load_profile
from coordexp.stage import tune_allocator
class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.mallinfo2.restype = ctypes.c_void_p, [ctypes.c_size_t], Mallinfo2
if sys.argv[1] == "tuned":
    assert tune_allocator(logging.getLogger()).keeps_freed_memory
before = libc.mallinfo2().hblks
libc.malloc(100 * 2**20)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(not ON_GLIBC, reason="the settings exist only in glibc")
@pytest.mark.parametrize(("mode", "mapped_blocks"), [("default", 1), ("tuned", 0)])
def test_large_blocks_come_from_retained_memory(repository: Path, mode: str, mapped_blocks: int) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", MAPPED_BYTES, mode],
        env={"PYTHONPATH": str(repository / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(answer.stdout) == mapped_blocks
