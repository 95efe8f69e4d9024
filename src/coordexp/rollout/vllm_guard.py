"""Runs a server and ends it when the parent process is gone, even if that was killed.

    python vllm_guard.py PARENT_PID TEMPORARY_FOLDER COMMAND...

It is the leader of the process group of the server and its workers. While the parent lives, it only waits, and exits
with the server's exit code. It runs as a file, in an interpreter without our packages.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

LOOK_SECONDS = 0.5
STOP_SECONDS = 20.0


def guard(parent: int, folder: str, command: Sequence[str]) -> int:
    """Wait for the command and return its exit code; if the parent ends, end the whole group and remove the folder."""
    # SIGTERM to the group is for the server, which may need time. A child does not inherit a handler, unlike SIG_IGN.
    signal.signal(signal.SIGTERM, _go_on)
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return 126
    while os.getppid() == parent:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(LOOK_SECONDS)
            return code if code >= 0 else 128 - code
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # remaining workers and this process
    return 1


def _go_on(number: int, frame: FrameType | None) -> None:
    """Ignore the SIGTERM of the group."""


if __name__ == "__main__":
    raise SystemExit(guard(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
