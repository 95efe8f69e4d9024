"""What the tensor library reads before it starts: CPU threads, how long an idle one waits, and its allocator on CUDA.

GNU OpenMP, which torch computes with, lets an idle thread spin for long. On cores that other processes want too, the
threads that work then wait for those that spin: a training step takes 2 to 4 times as long (benchmarks/NOTES.md). A
bounded spin costs nothing that can be measured on idle cores. The library reads the bound once, when it is loaded.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from coordexp.infra.files import write_text

SPIN_NAME, SPIN_ROUNDS = "GOMP_SPINCOUNT", "20000"
POLICY_NAME = "OMP_WAIT_POLICY"  # says the same in words; whoever sets it has decided
COUNT_NAME = "OMP_NUM_THREADS"
CUDA_ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # every version of torch reads the first
COUNT_FILE, MAX_THREADS = "threads", 1024
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of CPU time per period, or "max"


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound the spinning of idle threads unless the environment says how they wait; before torch is imported."""
    if POLICY_NAME not in environment:
        environment.setdefault(SPIN_NAME, SPIN_ROUNDS)


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's allocator on CUDA extend its segments, unless the environment says how it works; before it starts.

    Packs differ in width from step to step: with segments of fixed sizes, what one step freed would not serve the next.
    """
    if not any(name in environment for name in CUDA_ALLOCATOR_NAMES):
        environment[CUDA_ALLOCATOR_NAMES[0]] = "expandable_segments:True"


def usable_cores(quota_file: Path = _QUOTA) -> int:
    """Cores that this process may use: its affinity, and what a container grants it, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        granted, period = quota_file.read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(granted) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or no limit ("max")
        return cores


def set_threads(wanted: int, log: logging.Logger, quota_file: Path = _QUOTA) -> int | None:
    """Set the number of threads of the tensor library, loaded or not, and log it with the reason.

    Args:
        wanted: number of threads (`launch.threads`); 0 leaves the choice to the library, which knows the cores but not
            what a container grants: then it gets no more than that.
        log: where the line goes.
        quota_file: what the container grants.

    Returns:
        The number that was set; None if the library chooses.
    """
    cores = usable_cores(quota_file)
    chosen, reason = _choose(wanted, cores, usable_cores(Path(os.devnull)))
    if chosen is not None:
        os.environ[COUNT_NAME] = str(chosen)  # for a library that is not loaded yet, and for child processes
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(chosen)
    waiting = f"{POLICY_NAME} {os.environ[POLICY_NAME]}" if POLICY_NAME in os.environ else f"spin {_spin()}"
    log.info("threads: %s (%s); %d cores usable; idle threads: %s", chosen or "default", reason, cores, waiting)
    return chosen


def hold_threads(folder: Path, log: logging.Logger, *, writes: bool = True) -> None:
    """Let torch compute with as many threads as the run in `folder` began with, and say so if it had others.

    Sums over other numbers of threads are rounded otherwise: a resumed run would end in other bytes. With `writes`, a
    run that begins here leaves its number for those that go on with it.
    """
    torch, path = sys.modules["torch"], folder / COUNT_FILE
    now = torch.get_num_threads()
    said = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if said.isdecimal() and 0 < int(said) <= MAX_THREADS:
        if int(said) != now:
            log.warning("threads: %s, with which this run began, and not %d: so its sums stay the same.", said, now)
            torch.set_num_threads(int(said))
    elif writes:
        write_text(path, f"{now}\n")


def _choose(wanted: int, usable: int, present: int) -> tuple[int | None, str]:
    if wanted:
        return wanted, "launch.threads"
    if COUNT_NAME in os.environ:
        return None, f"{COUNT_NAME}={os.environ[COUNT_NAME]}"
    if usable < present:
        return usable, "what this container grants"
    return None, "the tensor library's choice"


def _spin() -> str:
    return f"{os.environ.get(SPIN_NAME, 'unbounded')} rounds, then sleep"
