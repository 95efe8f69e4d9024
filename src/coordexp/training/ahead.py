"""Making the next batch while this one is trained on: decoding pictures then costs no step any time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order, each made in a thread while the one before it is in use.

    What making an item raises is raised where it is taken.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="next-batch") as thread:
        pending = thread.submit(_taken, iterator)
        while taken := pending.result():
            pending = thread.submit(_taken, iterator)
            yield taken[0]


def _taken(iterator: Iterator[T]) -> tuple[()] | tuple[T]:
    """The next item, or nothing at the end. (A StopIteration cannot leave a thread.)"""
    for item in iterator:
        return (item,)
    return ()
