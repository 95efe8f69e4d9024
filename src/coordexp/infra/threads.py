"""Settings that torch reads when it is loaded: CPU threads, spinning of idle threads, and the CUDA allocator.

GNU OpenMP, which torch uses, lets idle threads spin for a long time. On cores that other processes need, too, working
threads then wait for spinning ones: a training step takes 2 to 4 times as long (benchmarks/NOTES.md). On idle cores a
bounded spin has no measurable cost. The library reads the bound once, when it is loaded.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from coordexp.infra.files import write_text

SPIN_NAME, SPIN_ROUNDS = "GOMP_SPINCOUNT", "2000"
POLICY_NAME = "OMP_WAIT_POLICY"  # the portable setting of the same; if the user sets it, it is respected
COUNT_NAME = "OMP_NUM_THREADS"
CUDA_ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # every version of torch reads the first
COUNT_FILE, MAX_THREADS = "threads", 1024
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of CPU time per period, or "max"


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound the spinning of idle threads unless the environment sets a policy; call before torch is imported."""
    if POLICY_NAME not in environment:
        environment.setdefault(SPIN_NAME, SPIN_ROUNDS)


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's CUDA allocator extend its segments unless the environment configures it; call before it starts.

    Packs differ in width from step to step. With segments of fixed size, memory that one step freed would not fit the
    tensors of the next (fragmentation).
    """
    if not any(name in environment for name in CUDA_ALLOCATOR_NAMES):
        environment[CUDA_ALLOCATOR_NAMES[0]] = "expandable_segments:True"


def usable_cores(quota_file: Path = _QUOTA) -> int:
    """Number of cores that this process may use, from its CPU affinity and the container's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        granted, period = quota_file.read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(granted) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or no limit ("max")
        return cores


def set_threads(wanted: int, log: logging.Logger, quota_file: Path = _QUOTA) -> int | None:
    """Set the number of threads of torch, loaded or not, and log it with the reason.

    Args:
        wanted: number of threads (`launch.threads`). 0 leaves the choice to torch, limited to the quota of the
            container, which torch does not know.
        log: receives the log line.
        quota_file: the CPU quota of the container.

    Returns:
        The number that was set; None if torch chooses.
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
    """Use as many threads as the run in `folder` started with, and log a warning if that changes the number.

    Floating-point addition is not associative: another number of threads splits sums differently, and a resumed run
    would end with different bytes. With `writes`, a new run stores its number for later resumption.
    """
    torch, path = sys.modules["torch"], folder / COUNT_FILE
    now = torch.get_num_threads()
    said = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if said.isdecimal() and 0 < int(said) <= MAX_THREADS:
        if int(said) != now:
            log.warning(
                "threads: %s instead of %d: this run started with them, and its sums depend on them.", said, now
            )
            torch.set_num_threads(int(said))
    elif writes:
        write_text(path, f"{now}\n")


def _choose(wanted: int, usable: int, present: int) -> tuple[int | None, str]:
    if wanted:
        return wanted, "launch.threads"
    if COUNT_NAME in os.environ:
        return None, f"{COUNT_NAME}={os.environ[COUNT_NAME]}"
    if usable < present:
        return usable, "the quota of this container"
    return None, "chosen by torch"


def _spin() -> str:
    return f"{os.environ.get(SPIN_NAME, 'unbounded')} rounds, then sleep"
