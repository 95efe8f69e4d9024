"""Progress read from the output of a running experiment, and the format of times."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.experiments.progress import Progress, duration, total
from terminal import on_a_terminal

LINES = """\
Stage 'raw' didn't change, skipping
Running stage 'stage1':
> python -m pipelines.stage1
16:00:01 step 10/200 (5 %) loss/total 3.1 lr 1e-3 0.50 s/step eta 95 s
16:00:02 step 20/200 (10 %) loss/total 3.0 lr 1e-3 0.50 s/step eta 90 s
Updating lock file 'dvc.lock'
Stage 'rollout' is cached - skipping run, checking out outputs
Running stage 'decode@stage1':
16:00:03 generated 32 of 64 images, 900 tokens/s
"""


def test_stages_counts_and_times_are_read_from_the_lines() -> None:
    now, said = [0.0], []
    progress = Progress("x", {"stage1": 130.0}, said.append, clock=lambda: now[0])
    words = []
    for line in LINES.splitlines():
        progress.read(line)
        words.append(progress.words())
        now[0] += 20
    assert words[0] == "x: DVC is preparing or saving the run"
    assert words[1:5] == [
        "x: stage1, 0s of about 2m10s",
        "x: stage1, 20s of about 2m10s",
        "x: stage1, step 10 of 200, 40s of about 2m10s",
        "x: stage1, step 20 of 200, 1m00s of about 2m10s",
    ]
    assert words[5] == words[0]
    assert words[8] == "x: decode@stage1, image 32 of 64, 20s"
    assert said == [words[1], words[3], words[7]]  # each start, and no more than a line in half a minute
    progress.finish_stage()
    assert progress.seconds == {"stage1": 80.0, "decode@stage1": 40.0}


SCRIPT = f"""
import time
from coordexp.experiments.progress import Progress
progress = Progress("x", {{"stage1": 130.0}}, print)
with progress.shown():
    for line in {LINES.splitlines()!r}:
        progress.read(line)
        time.sleep(0.3)
"""


def test_a_terminal_shows_a_bar_of_the_running_stage(repository: Path) -> None:
    written = on_a_terminal(SCRIPT, repository)
    assert "x: stage1, step 10 of 200" in written
    assert "━" in written
    assert written.count("\n") < 3, "one line, drawn again and again"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0s"), (59.6, "1m00s"), (200, "3m20s"), (725, "12m"), (7500, "2h05m"), (360000, "100h")],
)
def test_a_time_fits_into_five_characters(seconds: float, shown: str) -> None:
    assert (duration(seconds), len(shown) <= 5) == (shown, True)


def test_a_sum_mentions_unmeasured_times() -> None:
    assert total([]) == "no time"
    assert total([None]) == "an unknown time"
    assert total([30.0, 31.0]) == "1m01s"
    assert total([30.0, None]) == "30s plus stages without a measured time"
