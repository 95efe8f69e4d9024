"""Runs a server and ends it when the process that wanted it is gone, even if that was killed.

    python vllm_guard.py PARENT_PID TEMPORARY_FOLDER COMMAND...

It leads the process group of the server and of its workers. As long as the parent lives it does nothing but wait, and
exits as the server does. It is run as a file, by an interpreter without our packages.
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
    """Wait for the command and return its exit code; without a parent, end the whole group and remove the folder."""
    # A group's SIGTERM is meant for the server, which may take its time. A handler is not inherited, SIG_IGN would be.
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
    os.killpg(0, signal.SIGKILL)  # workers that are left, and this process
    return 1


def _go_on(number: int, frame: FrameType | None) -> None:
    """Let the group's SIGTERM pass by."""


if __name__ == "__main__":
    raise SystemExit(guard(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
