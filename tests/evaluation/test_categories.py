from __future__ import annotations

import pytest

from coordexp.errors import DataError
from coordexp.evaluation.categories import NO_CATEGORY, CategoryIndex
from coordexp.records.categories import Category
from coordexp.records.descriptions import normalise_desc


@pytest.mark.parametrize(
    ("desc", "expected"),
    [
        ("Black_Cat", "black cat"),
        ("  black\tcat \n", "black cat"),
        ("bow_(decorative_ribbons)", "bow decorative ribbons"),
        ("black\x00cat\x1b", "black cat"),
        ("Übergröße", "übergröße"),
        ("", ""),
    ],
)
def test_normalise(desc, expected):
    assert normalise_desc(desc) == expected
    assert normalise_desc(expected) == expected


def test_exact_comes_before_normalised():
    index = CategoryIndex([Category(7, "traffic_light"), Category(2, "cat", "held_out")])
    assert index.lookup("traffic_light") == (1, "exact")
    assert index.lookup("Traffic Light") == (1, "normalised")
    assert index.lookup("traffic lights") == (NO_CATEGORY, "unmapped")
    assert (index.rows("train"), index.rows("held_out")) == ([1], [0])


@pytest.mark.parametrize(
    "categories",
    [[], [Category(1, "cat"), Category(1, "dog")], [Category(1, "black cat"), Category(2, "Black_cat")]],
    ids=["empty", "same id", "same normalised name"],
)
def test_ambiguous_lists_are_refused(categories):
    with pytest.raises(DataError):
        CategoryIndex(categories)
