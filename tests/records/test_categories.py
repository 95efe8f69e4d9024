"""categories.json: what is read, and that what cannot be read is named."""

from __future__ import annotations

import json

import pytest

from coordexp.errors import DataError
from coordexp.records.categories import Category, read_categories


def test_read_categories(tmp_path):
    path = tmp_path / "categories.json"
    path.write_text(json.dumps([{"id": 1, "name": "cat", "split": "held_out"}, {"id": 2, "name": "dog", "more": 1}]))
    assert read_categories(path) == (Category(1, "cat", "held_out"), Category(2, "dog", "train"))


def test_a_category_survives_its_file(tmp_path):
    path = tmp_path / "categories.json"
    categories = (Category(1, "cat", "held_out", "r"), Category(2, "dog"))
    path.write_text(json.dumps([c.to_json() for c in categories]))
    assert read_categories(path) == categories
    assert "frequency" not in categories[1].to_json()


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[",
        b'[{"id": 1, "name": "caf\xe9"}]',
        b"[" + b"1" * 5000 + b"]",
        b'[{"id": "1", "name": "cat"}]',
        b'[{"id": 1, "name": " "}]',
        b'[{"id": 1, "name": "a", "split": "val"}]',
        b'[{"id": 1, "name": "a", "frequency": "often"}]',
    ],
    ids=lambda content: repr(content[:40]),
)
def test_broken_category_files_are_named(tmp_path, content):
    path = tmp_path / "categories.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"categories\.json"):
        read_categories(path)
