"""Categories and their file; convert unifies names that evaluation cannot distinguish, as doctor reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordexp.doctor.records import examine
from coordexp.errors import DataError
from coordexp.evaluation.categories import CategoryIndex
from coordexp.records.categories import Category, read_categories
from coordexp.records.convert import Converted
from coordexp.records.names import respelled
from coordexp.records.schema import ObjectRecord, Record
from records_folders import coco_set, converted, edit, picture, records_config, write_split

PERSON = {"id": 1, "name": "person"}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Twelve training and six val images of persons, traffic lights and cats; there is no red mug."""
    root = tmp_path / "coco"
    write_split(root, "train2017", 100, 12)
    write_split(root, "val2017", 500, 6)
    return root


def convert(tmp_path: Path, sets: Any) -> Converted:
    result = converted(tmp_path, sets)
    CategoryIndex(result.categories())  # evaluation accepts what convert accepts
    return result


def findings(sets: Any) -> dict[str, tuple[bool, str]]:
    found = examine(sets, records_config(), decode=False, workers=2).findings
    return {f.reason: (f.stops, f.examples[0]) for f in found}


def with_category(root: Path, category: dict[str, Any]) -> None:
    for split in ("train2017", "val2017"):
        edit(root, split, categories=lambda old: [category, *old])


@pytest.mark.parametrize("name", ["person", "Person", "_person_"])
def test_of_two_categories_with_one_name_the_unused_is_omitted(coco, tmp_path, name):
    with_category(coco, {"id": 0, "name": name, "supercategory": "none"})
    result = convert(tmp_path, {"coco": coco_set(coco)})
    assert [(c.id, c.name) for c in result.categories()][:2] == [(1, "person"), (2, "traffic light")]
    assert f"0 {name!r}" in result.notes[0]
    stops, example = findings({"coco": coco_set(coco)})["category_unused"]
    assert (stops, "1 'person' is kept" in example) == (False, True)


def test_two_unicode_forms_of_an_accent_are_one_name(coco, tmp_path):
    """The tokenizer writes the composed form, so no answer could contain a name in the other form."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for split in ("train2017", "val2017"):
        edit(coco, split, categories=[{"id": i, "name": name} for i, name in enumerate((decomposed, "x", "y", "z"), 1)])
    result = convert(tmp_path, {"coco": coco_set(coco)})
    assert {o.desc for r in result.splits["train"] for o in r.objects} == {composed, "x", "y"}
    (first, *_) = result.categories()
    assert (first.name, first.aliases) == (composed, (decomposed,))
    with_category(coco, {"id": 9, "name": composed})
    assert "category_unused" in findings({"coco": coco_set(coco)})


def test_a_parent_category_without_annotations_is_omitted_and_reported(coco, tmp_path):
    for split in ("train2017", "val2017"):
        edit(coco, split, categories=lambda old: [
            {"id": 0, "name": "things", "supercategory": "none"}, *(row | {"supercategory": "things"} for row in old),
        ])  # fmt: skip
    result = convert(tmp_path, {"coco": coco_set(coco)})
    assert [c.name for c in result.categories()] == ["person", "traffic light", "cat", "red mug"]
    assert result.notes == ["coco: category 0 'things' is the parent of the others and has no annotation: omitted"]
    assert findings({"coco": coco_set(coco)})["category_unused"][0] is False


@pytest.mark.parametrize("name", ["cat", "CAT"])
def test_two_used_categories_with_one_name_are_refused(coco, tmp_path, name):
    for split in ("train2017", "val2017"):
        edit(coco, split, categories=lambda old: [row | ({"name": name} if row["id"] == 1 else {}) for row in old])
    with pytest.raises(
        DataError, match=rf"coco: categories 1 '{name}' and 3 'cat' have the same name.*both have annotations"
    ):
        convert(tmp_path, {"coco": coco_set(coco)})
    assert findings({"coco": coco_set(coco)})["names_clash"][0]


def test_a_name_of_several_sets_is_spelled_as_in_the_first(coco, tmp_path):
    other = tmp_path / "other"
    write_split(other, "train2017", 100, 12)
    for path in (other / "train2017").iterdir():
        picture(1000 + int(path.stem)).save(path)
    names = {"person": "Person", "traffic light": "Traffic_Light"}
    edit(
        other, "train2017", categories=lambda old: [row | {"name": names.get(row["name"], row["name"])} for row in old]
    )
    sets = {"coco": coco_set(coco, prompt="listed"), "mine": coco_set(other, val="none", prompt="listed")}
    result = convert(tmp_path, sets)
    assert [c.name for c in result.categories()] == ["cat", "person", "red mug", "traffic light"]
    assert [c.aliases for c in result.categories()] == [(), ("Person",), (), ("Traffic_Light",)]
    found = {o.desc for records in result.splits.values() for r in records for o in r.objects}
    asked = {n for records in result.splits.values() for r in records for n in r.metadata["prompt"]["names"]}
    assert found | asked == {"cat", "person", "red mug", "traffic light"}
    assert result.notes == ["mine: 'Person' is written 'person'", "mine: 'Traffic_Light' is written 'traffic light'"]
    assert findings(sets)["names_merged"] == (False, "'Person' is written 'person'")


def test_names_in_metadata_get_the_same_spelling():
    metadata = {"absent": ["Dog", "cat"], "not_exhaustive": ["Cat"], "phrase": "Cat", "image_id": 3}
    record = Record("a.jpg", 9, 9, (ObjectRecord("Cat", (0, 0, 1, 1)),), metadata=metadata)
    (changed,) = respelled([record], {"Cat": "cat"})
    assert changed.objects[0].desc == "cat"
    assert changed.metadata == {"absent": ["Dog", "cat"], "not_exhaustive": ["cat"], "phrase": "cat", "image_id": 3}


def test_evaluation_reports_clashing_categories():
    with pytest.raises(DataError, match=r"categories 1 'black cat' and 7 'Black_cat' have the same name"):
        CategoryIndex([Category(1, "black cat"), Category(7, "Black_cat")])


def test_categories_are_read_back_from_their_file(tmp_path):
    path = tmp_path / "categories.json"
    categories = (Category(1, "cat", "held_out", "r"), Category(2, "dog"))
    path.write_text(json.dumps([c.to_json() for c in categories]))
    assert read_categories(path) == categories
    assert "frequency" not in categories[1].to_json()
    path.write_text(json.dumps([{"id": 2, "name": "dog", "more": 1}]))
    assert read_categories(path) == (Category(2, "dog", None),), "not specified whether it is in training"


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
def test_invalid_category_files_are_errors_with_the_entry(tmp_path, content):
    path = tmp_path / "categories.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"categories\.json"):
        read_categories(path)
