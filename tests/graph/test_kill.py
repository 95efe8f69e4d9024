"""The graph under `kill`: wherever a run is killed, running `dvc repro` again gives the undisturbed results.

A campaign runs the smoke profile once and kills it at four places on the way. `make test-faults` runs all of them: 20
places, drawn from a seed. `make test-faults POINTS="16 19"` kills one run at the places of these numbers, counted from
0 over all campaigns. `make test-all` kills a run at FEW places, of the stages that follow from stage 1. What
happens at each operation on files inside a stage is the matter of tests/fault_lab.py.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from ruamel.yaml import YAML

from coordexp.config.loading import read_yaml
from smoke_clone import STAGES, Clone, new_clone
from workspaces import ANSWERING

CAMPAIGNS, POINTS = 5, 4
LONG = ("stage1", "rollout", "stage2", "stage1-control", "decode@stage2")  # where a run spends its time
SETTLES_WITHIN_S = 120.0
BUSY = r"Unable to acquire lock|is busy, it is being"  # in the words of DVC


@dataclass(frozen=True, slots=True)
class Point:
    """Kill `target` with `number`, `delay_s` after `stage` began."""

    stage: str
    delay_s: float
    number: signal.Signals
    target: str  # one of TARGETS


TARGETS = ("group", "stage", "dvc")  # dvc and the stage, the stage alone, or dvc alone, whose stage then goes on
WAYS = list(product((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), TARGETS))


def campaign(seed: int) -> list[Point]:
    """The places of one campaign, in the order of the graph."""
    rng = random.Random(seed)
    stages = [*rng.sample(LONG, POINTS - 1), rng.choice([s for s in STAGES if s not in LONG])]
    ways = [WAYS[(seed * POINTS + place) % len(WAYS)] for place in range(POINTS)]
    return [
        Point(stage, round(rng.uniform(0.0, 8.0 if stage in LONG else 3.0), 2), *way)
        for stage, way in zip(sorted(stages, key=STAGES.index), ways, strict=True)
    ]


# One of each: a signal that kills at once and one that lets a stage save, sent to the stage alone and also to dvc.
FEW = [Point("stage1", 4.0, signal.SIGKILL, "group"), Point("stage2", 5.0, signal.SIGTERM, "stage")]


def campaigns() -> list[ParameterSet]:
    """Cases of places: the campaigns, or those chosen by the environment."""
    every = [campaign(seed) for seed in range(CAMPAIGNS)]
    if numbers := [int(number) for number in os.environ.get("FAULT_POINTS", "").split()]:
        places = [point for points in every for point in points]
        chosen = sorted((places[number] for number in numbers), key=lambda point: STAGES.index(point.stage))
        return [pytest.param(chosen, id="-".join(map(str, numbers)))]
    return [pytest.param(points, id=str(seed)) for seed, points in enumerate(every)]


def test_the_campaigns_contain_twenty_places_of_every_kind() -> None:
    points = [point for seed in range(CAMPAIGNS) for point in campaign(seed)]
    assert len(points) == 20
    assert {p.stage for p in points} >= set(LONG)
    assert {(p.number, p.target) for p in points} == set(WAYS)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("points", campaigns())
def test_a_killed_run_ends_with_the_results_of_an_undisturbed_one(
    points: list[Point], finished: Clone, repository: Path, tmp_path: Path
) -> None:
    copy = new_clone(repository, tmp_path / "clone", tmp_path / "home", ANSWERING)
    assert_ends_alike(copy, finished, points)


@pytest.mark.slow
def test_another_machine_makes_the_same_bytes_even_if_killed_at_few_places(other: Clone, finished: Clone) -> None:
    """Nothing is fetched: all stages run, under another home, and git has nothing to say about it.

    While it is killed, each stage has an interpreter. The first run forked its stages from one, so this also says that
    it does not matter.
    """
    assert not (other.root / "runs").exists()
    forget(other, STAGES[STAGES.index("stage1") :])
    other.succeed("dvc", "repro", "pack")
    assert_ends_alike(other, finished, FEW)
    assert other.succeed("git", "status", "--porcelain") == ""


def assert_ends_alike(copy: Clone, finished: Clone, points: list[Point]) -> None:
    """Run and kill at the places, then run to the end."""
    killed = replace(copy, warm=None)  # a stage that was forked elsewhere is not in the session of `dvc`
    report = [kill_at(killed, point) for point in points]
    print(*report, sep="\n")
    copy.succeed("dvc", "repro")
    locks = [(c.root / "dvc.lock").read_bytes() for c in (finished, copy)]
    assert locks[0] == locks[1], f"other outputs after {report}"
    summary = json.loads((copy.root / "runs" / "smoke" / "stage2-rollouts.json").read_text())
    assert summary["f1"] > 0.5, "what is compared was learnt"
    assert not list(copy.root.rglob(".*.tmp")), "litter of a cut write"
    assert copy.run("dvc", "status", "--quiet").returncode == 0


def forget(clone: Clone, stages: Sequence[str]) -> None:
    """Remove stages that have not run here from dvc.lock."""
    lock = read_yaml(clone.root / "dvc.lock")
    for stage in stages:
        del lock["stages"][stage]
    YAML().dump(lock, clone.root / "dvc.lock")


@pytest.mark.slow
def test_a_second_repro_in_the_same_tree_is_refused(repository: Path, tmp_path: Path) -> None:
    copy = new_clone(repository, tmp_path / "clone", tmp_path / "home")
    with copy.start("dvc", "repro", "convert") as first:
        wait_for_stage(first, "raw")
        while not (running := stage_processes(first.pid)):
            time.sleep(0.05)
        os.kill(running[0], signal.SIGSTOP)  # however slow the second is, it meets the first
        second = copy.run("dvc", "repro", "convert")
        os.kill(running[0], signal.SIGCONT)
        first.communicate()
    assert second.returncode != 0
    assert re.search(BUSY, second.stdout), second.stdout[-2000:]
    assert first.returncode == 0
    assert "didn't change" in copy.succeed("dvc", "repro", "convert")


def kill_at(copy: Clone, point: Point) -> str:
    """Run until the place is reached, kill, and wait until nothing of the run is left; returns what happened."""
    with copy.start("dvc", "repro") as process:
        seen = wait_for_stage(process, point.stage)
        time.sleep(point.delay_s)
        victims = stage_processes(process.pid) if point.target == "stage" else []
        with suppress(ProcessLookupError):  # it ended just before
            if point.target == "group":
                os.killpg(process.pid, point.number)
            if point.target == "dvc":
                os.kill(process.pid, point.number)
            for victim in victims:
                os.kill(victim, point.number)
        rest, _ = process.communicate()
        wait_until_gone(process.pid)
    exits = re.findall(r"exited with (-?\d+)", rest)
    last = re.findall(r"Running stage '([^']+)'", seen + rest)[-1:]
    if exits and (lock := copy.root / "dvc.lock").is_file():
        assert not set(last) & read_yaml(lock)["stages"].keys(), "an interrupted stage was recorded"
    return f"{point}: dvc {process.returncode}, stage {exits or '-'}"


def wait_for_stage(process: subprocess.Popen[str], stage: str) -> str:
    """Read the output until the stage begins, or was skipped, or the run ends."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if f"'{stage}'" in line and ("Running stage" in line or "skipping" in line):
            break
    return "".join(seen)


def members(session: int) -> Iterator[tuple[int, str]]:
    """Living processes of a session, with their command lines."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            yield int(folder.name), command


def stage_processes(session: int) -> list[int]:
    return [pid for pid, command in members(session) if re.search(r"python\S* -m pipelines\.", command)]


def wait_until_gone(session: int) -> None:
    deadline = time.monotonic() + SETTLES_WITHIN_S
    while any(members(session)):
        assert time.monotonic() < deadline, f"still running: {list(members(session))}"
        time.sleep(0.1)
