"""Processes that share the work of one on this machine's CPUs: how many, and their results in the order of the work.

They are forks: what all of them need, such as the facts of a million pictures, is there without being sent or copied.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from coordexp.errors import ConfigError, CoordExpError, ProcessError
from coordexp.infra.threads import usable_cores

T = TypeVar("T")
R = TypeVar("R")

WORKERS_VARIABLE = "COORDEXP_WORKERS"  # in the environment: how many there are; without it, one for each core
MAX_WORKERS = 256
BATCH = 200  # items of one call: enough that sending them costs little
_WAITING = 2  # batches for each process that are under way or wait for it

_work: Callable[[list[Any]], Any]  # in a worker process


def worker_count() -> int:
    """How many processes, or threads, read annotations and pictures; no result depends on it.

    Raises:
        ConfigError: the environment names no such number.
    """
    wanted = os.environ.get(WORKERS_VARIABLE, "")
    if not wanted:
        return usable_cores()
    if not wanted.isdecimal() or not 1 <= int(wanted) <= MAX_WORKERS:
        raise ConfigError(f"{WORKERS_VARIABLE} is {wanted!r}, expected a number of processes from 1 to {MAX_WORKERS}.")
    return int(wanted)


def map_batches(work: Callable[[list[T]], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """What `work` makes of each `BATCH` of the items, in their order.

    The first batch is done by this process, and the others by up to `workers` of them, no more than there are batches.
    Errors are those of one process: that of the first batch that has one.

    Args:
        work: takes a list of items; it is inherited by the processes, what it returns is sent back.
        items: read by this process, no further ahead than the processes need.
        workers: how many processes; with 1 this one does it all.

    Raises:
        ProcessError: a process ended before its work was done.
    """
    batches = _batches(items)
    for first in batches:
        yield work(first)
        break
    if workers < 2:
        yield from map(work, batches)
        return
    waiting = _until_error(batches)
    ahead = list(islice(waiting, workers))
    pool = ProcessPoolExecutor(max(1, len(ahead)), multiprocessing.get_context("fork"), _start, (work,))
    coming: deque[Future[R]] = deque()
    try:
        for found in chain(ahead, waiting):
            if isinstance(found, CoordExpError):  # what is wrong in the items before it comes first
                yield from (future.result() for future in coming)
                raise found
            coming.append(pool.submit(_call, found))
            if len(coming) >= _WAITING * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    except BrokenProcessPool as error:
        raise ProcessError(
            f"one of the {workers} processes that read the data ended before its work was done: killed, or out of "
            f"memory. Run the same command again; if memory ran short, with a smaller {WORKERS_VARIABLE}."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    waiting = iter(items)
    while taken := list(islice(waiting, BATCH)):
        yield taken


def _until_error(batches: Iterator[list[T]]) -> Iterator[list[T] | CoordExpError]:
    try:
        yield from batches
    except CoordExpError as error:
        yield error


def _start(work: Callable[[list[Any]], Any]) -> None:
    global _work
    begin_worker()
    _work = work


def _call(items: list[Any]) -> Any:
    return _work(items)


def begin_worker() -> None:
    """Make this process one that ends with the process that started it, and leaves Ctrl-C to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
