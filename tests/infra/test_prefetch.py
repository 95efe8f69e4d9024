"""Prefetching: the same items in the same order, prepared ahead, and errors at the correct item."""

from __future__ import annotations

import sys
import threading

import pytest

from coordexp.infra.prefetch import Prefetcher, ahead


@pytest.mark.parametrize("items", [[], [0], [None, False, 3]])
def test_items_come_in_the_same_order(items):
    assert list(ahead(items)) == items


def test_the_next_item_is_prepared_while_the_present_one_is_in_use():
    second_is_made = threading.Event()

    def items():
        yield 1
        second_is_made.set()
        yield 2

    taken = ahead(items())
    assert next(taken) == 1
    assert second_is_made.wait(timeout=10)
    assert next(taken) == 2


def test_at_most_one_item_is_prepared_ahead():
    made = []

    def items():
        for i in range(5):
            made.append(i)
            yield i

    for item in ahead(items()):
        assert len(made) <= item + 2
    assert made == [0, 1, 2, 3, 4]


def test_an_abandoned_generator_may_be_collected_in_its_thread():
    """This happens to a task and its batches, which refer to each other."""
    problems, owner, in_use = [], {}, threading.Event()

    def items():
        yield 1
        in_use.wait(timeout=10)
        owner.clear()  # the last reference to the generator that waits for this
        yield 2

    hook, threading.excepthook = threading.excepthook, problems.append
    unraisable, sys.unraisablehook = sys.unraisablehook, problems.append
    others = threading.enumerate()
    try:
        owner["taken"] = ahead(items())
        next(owner["taken"])
        in_use.set()
        for thread in set(threading.enumerate()).difference(others):
            thread.join(timeout=10)
    finally:
        threading.excepthook, sys.unraisablehook = hook, unraisable
    assert not problems
    assert not owner


def test_an_error_is_raised_where_its_item_is_taken():
    def items():
        yield 1
        raise ValueError("broken picture")

    taken = ahead(items())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="broken picture"):
        next(taken)


BATCHES = {0: "a", 1: "bc", 2: "d", 3: "ef", 4: "g"}


def taken(ahead: Prefetcher[str], step: int) -> str:
    return "".join(batch for batch, _ in ahead.take(step))


@pytest.mark.parametrize("steps", [[0, 1, 2, 3, 4], [1, 2], [3], [2, 2, 1, 4, 0, 1]])
@pytest.mark.parametrize("not_before", [(), (0,), (2, 3), (0, 1, 2, 3, 4)])
def test_a_step_gets_its_own_batches_in_any_order_of_steps(steps, not_before):
    ahead = Prefetcher(BATCHES.__getitem__, len(BATCHES), not_before)
    assert [taken(ahead, step) for step in steps] == [BATCHES[step] for step in steps]


def test_a_step_abandoned_in_the_middle_restarts():
    ahead = Prefetcher(BATCHES.__getitem__, len(BATCHES))
    taken(ahead, 0)
    assert next(ahead.take(1))[0] == "b"
    assert taken(ahead, 1) == "bc"


def test_steps_are_prepared_ahead_only_up_to_one_that_must_not_be():
    begun = {step: threading.Event() for step in BATCHES}

    def of_step(step: int) -> str:
        begun[step].set()
        return BATCHES[step]

    ahead = Prefetcher(of_step, len(BATCHES), not_before=[2])
    taken(ahead, 0)
    assert begun[1].wait(timeout=10)
    taken(ahead, 1)
    assert list(ahead._coming) == []  # the thread has no more items to prepare
    assert not begun[2].is_set()
    assert taken(ahead, 2) == "d"
    assert begun[3].wait(timeout=10)
