"""A pseudo-terminal for programs that behave differently on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path


def on_a_terminal(script: str, repository: Path) -> str:
    """The output of a program whose stdout and stderr are one terminal."""
    ours, its = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(repository / "src"), "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        written = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            written += part
    os.close(ours)
    assert process.returncode == 0, written
    return written.decode()
