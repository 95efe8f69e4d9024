"""A progress bar on a terminal moves, is removed at the end, and keeps log lines intact; elsewhere there is no bar."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from terminal import on_a_terminal

SCRIPT = """
import logging, sys
from coordexp.infra.progress import StdoutHandler, bar
logging.basicConfig(handlers=[StdoutHandler()], format="%(message)s", level=logging.INFO)
with bar("train", 4) as at:
    for done in range(1, 5):
        logging.info("step %d/4 is a line of its own", done)
        at(done)
print("the end")
"""


def test_log_lines_above_the_bar_stay_intact(repository: Path) -> None:
    written = on_a_terminal(SCRIPT, repository)
    assert "train" in written
    assert "4/4" in written
    for done in range(1, 5):
        assert f"step {done}/4 is a line of its own\r\n" in written
    assert written.endswith("the end\r\n")
    # The last output erases the line, moves the cursor to its start, and shows the cursor.
    assert "\x1b[2K" in written.split("step 4/4")[1]


def test_without_a_terminal_the_log_has_only_lines(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={"PYTHONPATH": str(repository / "src")}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [f"step {n}/4 is a line of its own" for n in range(1, 5)] + ["the end"]
    assert done.stderr == ""
