"""Taking dev out of train: disjoint, complete, and decided by each image alone."""

from __future__ import annotations

import random

import pytest

from coordexp.errors import DataError
from coordexp.records.schema import Record
from coordexp.records.splits import split_dev

RECORDS = [Record(f"images/{i:04d}.jpg", 64, 64, ()) for i in range(400)]


def names(records: list[Record]) -> list[str]:
    return [record.image for record in records]


def test_train_and_dev_share_no_image_and_lose_none():
    train, dev = split_dev(RECORDS, 60)
    assert len(dev) == 60
    assert not set(names(train)) & set(names(dev))
    assert sorted(names(train) + names(dev)) == names(RECORDS)


def test_the_order_of_the_source_does_not_matter():
    shuffled = random.Random(0).sample(RECORDS, len(RECORDS))
    assert split_dev(shuffled, 60) == split_dev(RECORDS, 60)


def test_a_larger_dev_contains_the_smaller_one():
    assert set(names(split_dev(RECORDS, 30)[1])) < set(names(split_dev(RECORDS, 60)[1]))


def test_new_images_never_move_an_old_one_into_dev():
    old, new = RECORDS[:300], RECORDS[300:]
    grown = set(names(split_dev(old + new, 60)[1])) - set(names(new))
    assert grown <= set(names(split_dev(old, 60)[1]))


def test_dev_is_spread_over_the_source():
    thirds = [int(name[7:11]) * 3 // 400 for name in names(split_dev(RECORDS, 90)[1])]
    assert all(15 <= thirds.count(third) <= 45 for third in range(3))


def test_one_image_listed_twice_is_in_one_split():
    train, dev = split_dev(RECORDS + RECORDS[:50], 60)
    assert not set(names(train)) & set(names(dev))


def test_no_dev_images():
    assert split_dev(RECORDS, 0) == (RECORDS, [])


@pytest.mark.parametrize("count", [400, 500])
def test_a_dev_that_leaves_nothing_to_train_on_is_refused(count):
    with pytest.raises(DataError, match=r"records\.dev_images is .* of 400"):
        split_dev(RECORDS, count)
