"""Prepare the next batch in a thread while the present one is in use, so that reading images delays nothing.

A thread, not the worker processes of torch's DataLoader: stage 2 makes batches from rollouts that training creates in
memory, which a worker process would not see. Image decoding releases the GIL, so a thread is enough.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The batches of a run; each is prepared while training uses the previous one, also across steps.

    Args:
        of_step: makes the batches of a step, at least one; runs in a thread.
        steps: number of steps of the run.
        not_before: steps whose batches must not be prepared early, because the step before creates their data.
    """

    def __init__(
        self, of_step: Callable[[int], Iterable[T]], steps: int, not_before: Collection[int] = frozenset()
    ) -> None:
        self._of_step = of_step
        self._steps = steps
        self._not_before = not_before
        self._coming: Iterator[tuple[T, bool]] = iter(())
        self._coming_step = -1

    def take(self, step: int) -> Iterator[tuple[T, float]]:
        """The batches of a step with the seconds waited for each; a step out of sequence restarts the thread."""
        if step != self._coming_step or step in self._not_before:
            self._coming = ahead(self._from(step))
        self._coming_step = -1  # invalid until all batches of this step are taken
        last = False
        while not last:
            started = time.monotonic()
            batch, last = next(self._coming)
            yield batch, time.monotonic() - started
        self._coming_step = step + 1

    def _from(self, first_step: int) -> Iterator[tuple[T, bool]]:
        for step in range(first_step, self._steps):
            if step != first_step and step in self._not_before:
                return
            yield from _with_last(self._of_step(step))


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item, and whether it is the last."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def ahead(items: Iterable[T], most: int = 1) -> Generator[T, None, None]:
    """The same items in the same order, of which a thread prepares up to `most` ahead of the one in use.

    An exception while preparing an item is raised where the item is taken.
    """
    iterator = iter(items)
    thread = ThreadPoolExecutor(1, thread_name_prefix="made-ahead")
    try:
        coming = deque(thread.submit(_taken, iterator) for _ in range(most))
        while taken := coming.popleft().result():
            coming.append(thread.submit(_taken, iterator))
            yield taken[0]
    finally:
        # An abandoned generator may be garbage-collected in this very thread, which cannot wait for itself.
        thread.shutdown(wait=False, cancel_futures=True)


def _taken(iterator: Iterator[T]) -> tuple[()] | tuple[T]:
    """The next item in a tuple, empty at the end. (A future cannot raise StopIteration.)"""
    for item in iterator:
        return (item,)
    return ()
