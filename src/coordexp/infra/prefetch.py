"""Making what comes next while this is in use: reading pictures then costs no training step and no answer any time.

In a thread, where torch's DataLoader has processes: stage 2 makes batches from rollouts that training makes in memory,
which a worker process would not see, and decoding pictures leaves Python's lock to the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The batches of a run's steps, each made while the one before it is trained on, also across steps.

    Args:
        of_step: the batches of a step, at least one; runs in a thread.
        steps: how many steps the run has.
        not_before: steps that must not be begun early, because training makes what their batches are made from.
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
        """The batches of a step, each with the seconds that it was waited for; any other than the next starts anew."""
        if step != self._coming_step or step in self._not_before:
            self._coming = ahead(self._from(step))
        self._coming_step = -1  # until all of this step is taken
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
    """Each item, and whether it is the last."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def ahead(items: Iterable[T], most: int = 1) -> Generator[T, None, None]:
    """The same items in the same order, up to `most` of them made in a thread while the one before them is in use.

    What making an item raises is raised where it is taken.
    """
    iterator = iter(items)
    thread = ThreadPoolExecutor(1, thread_name_prefix="made-ahead")
    try:
        coming = deque(thread.submit(_taken, iterator) for _ in range(most))
        while taken := coming.popleft().result():
            coming.append(thread.submit(_taken, iterator))
            yield taken[0]
    finally:
        # One who stops early may be collected in that very thread, which cannot wait.
        thread.shutdown(wait=False, cancel_futures=True)


def _taken(iterator: Iterator[T]) -> tuple[()] | tuple[T]:
    """The next item, or nothing at the end. (A StopIteration cannot leave a thread.)"""
    for item in iterator:
        return (item,)
    return ()
