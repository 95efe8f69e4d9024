"""One batch ahead: the same items in the same order, made early, and errors where they belong."""

from __future__ import annotations

import threading

import pytest

from coordexp.training.ahead import one_ahead


@pytest.mark.parametrize("items", [[], [0], [None, False, 3]])
def test_the_same_items_in_the_same_order(items):
    assert list(one_ahead(items)) == items


def test_the_next_item_is_made_while_this_one_is_in_use():
    second_is_made = threading.Event()

    def items():
        yield 1
        second_is_made.set()
        yield 2

    taken = one_ahead(items())
    assert next(taken) == 1
    assert second_is_made.wait(timeout=10)
    assert next(taken) == 2


def test_no_more_than_one_is_made_early():
    made = []

    def items():
        for i in range(5):
            made.append(i)
            yield i

    taken = one_ahead(items())
    next(taken)
    taken.close()  # waits for the one that is being made
    assert made == [0, 1]


def test_an_error_is_raised_where_its_item_is_taken():
    def items():
        yield 1
        raise ValueError("broken picture")

    taken = one_ahead(items())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="broken picture"):
        next(taken)
