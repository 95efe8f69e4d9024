"""A training step on a busy machine: the effect of other work, and of how waiting threads spin.

    PYTHONPATH=src python -m benchmarks.spinning [--busy 0,1,2,4] [--ways bounded,passive]

Each of the B other busy processes is a session of its own, so its fair share of C cores is C / (B + 1), at most one
core, and the rest is ours. The slowdown of a step is compared with the slowdown that this share would give. Each way
of waiting runs stage 1's loop (benchmarks.training_step) in its own process, because GNU OpenMP reads its wait policy
when it is loaded. Ratios are within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness import Figure, Row, machine, measured, run_child
from benchmarks.training_step import WARM_STEPS

from benchmarks import harness, tiny_run
from coordexp.infra.threads import COUNT_NAME, POLICY_NAME, SPIN_NAME, SPIN_ROUNDS

LIBRARY_ROUNDS = "300000"  # what libgomp does when nobody says how threads wait
WAYS = {
    "bounded": {SPIN_NAME: SPIN_ROUNDS},
    "library": {SPIN_NAME: LIBRARY_ROUNDS},
    "passive": {POLICY_NAME: "PASSIVE"},
    "one thread": {SPIN_NAME: SPIN_ROUNDS, COUNT_NAME: "1"},
}
IDLE_LIMIT, SHARE_LIMIT = 1.05, 2.0
_BUSY = "while True: sum(range(100000))"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """As many processes that want a core each, in sessions of their own: Linux shares cores among sessions first."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY], start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def fair_slowdown(busy_processes: int, cores: int) -> float:
    """How much longer a step of as many threads as cores takes on its fair share of them than alone.

    Every session gets the same time, but a busy process of one thread at most one core.
    """
    of_others = busy_processes * min(1.0, cores / (busy_processes + 1))
    return cores / (cores - of_others)


def seconds_per_sample(way: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Of stage 1's loop by wall and processors, where threads wait in this way."""
    own = ["-m", "benchmarks.training_step", "--child", "ours", "--profile", arguments.profile]
    command = [sys.executable, *own, "--root", str(arguments.root), "--steps", str(arguments.steps)]
    kept = [f"{name}={value}" for name, value in WAYS[way].items()]
    unset = [option for name in (SPIN_NAME, POLICY_NAME, COUNT_NAME) for option in ("-u", name)]
    output = run_child(["env", *unset, *kept, *command]).output
    found = json.loads(output.splitlines()[-1])
    return found["seconds_per_sample"], found["cpu_per_sample"]


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Times of each way beside the bounded spin, per number of busy processes."""
    run = tiny_run.open_run(arguments)
    if missing := tiny_run.absent("spinning threads", arguments, run.paths.norm1000 / "init", run.paths.packed):
        return missing
    if arguments.quick:
        toy = {"steps": WARM_STEPS + 1, "rounds": 1, "busy": "0", "ways": "bounded,library"}
        arguments = argparse.Namespace(**vars(arguments) | toy)
    rows, alone, ways = [], None, arguments.ways.split(",")
    for count in sorted(map(int, arguments.busy.split(","))):
        with busy(count):
            contestants = {way: (lambda way=way: seconds_per_sample(way, arguments)) for way in ways}
            found = [{way: run() for way, run in contestants.items()} for _ in range(arguments.rounds)]
        where = f"{count} busy processes on {machine()['cores']} cores" if count else "idle cores"
        bounded = Figure([turn["bounded"][0] for turn in found])
        if count == 0:
            alone = bounded.value
        elif alone:
            fair = alone * fair_slowdown(count, machine()["cores"])
            slower = Figure([seconds / fair for seconds in bounded.rounds])
            beside = "the fair share of the cores"
            rows.append(measured(f"crowded step: {where}", slower, "x", beside, at_most=SHARE_LIMIT))
        for way in ways[1:]:
            ratio = Figure(*([turn[way][clock] / turn["bounded"][clock] for turn in found] for clock in (0, 1)))
            least = 1 / IDLE_LIMIT if way == "library" and count == 0 else None
            name = f"waiting threads: {way}, {where}"
            rows.append(measured(name, ratio, "x", "the bounded spin, step time", at_least=least))
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    """Which run, how much other work, how long."""
    tiny_run.options(parser)
    parser.add_argument("--busy", default=f"0,{len(os.sched_getaffinity(0))}", help="numbers of busy processes")
    parser.add_argument("--ways", default="bounded,library,one thread", help="how threads wait, `bounded` first")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)


if __name__ == "__main__":
    harness.script("spinning", __doc__, measure, options)
