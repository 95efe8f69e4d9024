from __future__ import annotations

import json

import pytest

from coordexp.errors import DataError
from coordexp.evaluation.categories import NO_CATEGORY, Category, CategoryIndex, normalise_desc, read_categories


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


def test_read_categories(tmp_path):
    path = tmp_path / "categories.json"
    path.write_text(json.dumps([{"id": 1, "name": "cat", "split": "held_out"}, {"id": 2, "name": "dog", "more": 1}]))
    assert read_categories(path) == (Category(1, "cat", "held_out"), Category(2, "dog", "train"))


@pytest.mark.parametrize(
    "content",
    ["{}", "[", '[{"id": "1", "name": "cat"}]', '[{"id": 1, "name": " "}]', '[{"id": 1, "name": "a", "split": "val"}]'],
)
def test_broken_category_files_are_named(tmp_path, content):
    path = tmp_path / "categories.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"categories\.json"):
        read_categories(path)
