"""Workers of a process that was killed end, too."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from coordexp.infra.workers import end_with_parent


def _note(path: Path) -> None:
    (path / str(os.getpid())).touch()
    time.sleep(0.5)  # so that each of the workers gets one


def test_workers_do_not_outlive_the_process_that_was_killed(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with ProcessPoolExecutor(3, initializer=end_with_parent) as pool:
            list(pool.map(_note, [tmp_path] * 3))
            (tmp_path / "ready").touch()
            time.sleep(600)
    ends_at = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < ends_at
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    workers = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(workers) == 3
    while left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
        assert time.monotonic() < ends_at, left
        time.sleep(0.05)
