"""Worker processes that share CPU work on this machine and return results in the order of the items.

They are forks: shared data, such as the facts of a million images, is available without being sent or copied.
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

WORKERS_VARIABLE = "COORDEXP_WORKERS"  # environment variable: number of workers; default: one per core
MAX_WORKERS = 256
BATCH = 200  # items per call: enough to make the cost of sending them negligible
_WAITING = 2  # batches per process that are in progress or queued

_work: Callable[[list[Any]], Any]  # in a worker process


def worker_count() -> int:
    """Number of processes or threads that read annotations and images; results do not depend on it.

    Raises:
        ConfigError: the environment variable is not a valid number.
    """
    wanted = os.environ.get(WORKERS_VARIABLE, "")
    if not wanted:
        return usable_cores()
    if not wanted.isdecimal() or not 1 <= int(wanted) <= MAX_WORKERS:
        raise ConfigError(f"{WORKERS_VARIABLE} is {wanted!r}, expected a number of processes from 1 to {MAX_WORKERS}.")
    return int(wanted)


def map_batches(work: Callable[[list[T]], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Apply `work` to every `BATCH` of the items and yield the results in order.

    This process does the first batch; up to `workers` processes do the others, at most one per batch. An error is the
    one that a single process would raise: that of the first failing batch.

    Args:
        work: takes a list of items. The workers inherit it by fork; its results are sent back.
        items: read by this process, no further ahead than the workers need.
        workers: number of processes; with 1, this process does all the work.

    Raises:
        ProcessError: a worker ended before its work was done.
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
            if isinstance(found, CoordExpError):  # errors of earlier batches come first
                yield from (future.result() for future in coming)
                raise found
            coming.append(pool.submit(_call, found))
            if len(coming) >= _WAITING * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    except BrokenProcessPool as error:
        raise ProcessError(
            f"one of the {workers} processes that read the data ended early: it was killed or ran out of memory. Run "
            f"the same command again; if memory was short, set {WORKERS_VARIABLE} to a smaller number."
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
    """Make this process end together with its parent, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
