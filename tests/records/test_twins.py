"""An image with two ids, two names or in two sets becomes one record, or stops the conversion."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from coordexp.doctor.records import examine
from coordexp.errors import DataError
from coordexp.records.convert import Converted
from records_folders import annotation, coco_set, converted, edit, records_config, write_split

PICTURE, TWIN = f"{500:012d}.jpg", f"{700:012d}.jpg"
LEFT, RIGHT = [2, 3, 20, 25], [40, 3, 20, 25]


def two_sets(tmp_path: Path, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], one_set: bool) -> dict[str, Any]:
    """Val image 500 with `ours`, and the same content as 700, in the same set or another, with `theirs`."""
    first, second = tmp_path / "first", tmp_path / ("first" if one_set else "second")
    for root in {first, second}:
        write_split(root, "train2017", 100 if root == first else 300, 6)
        write_split(root, "val2017", 500 if root == first else 600, 3)
    shutil.copy(first / "val2017" / PICTURE, second / "val2017" / TWIN)
    row = {"id": 700, "file_name": TWIN, "width": 64, "height": 48}
    edit(second, "val2017", images=lambda old: [*old, row], annotations=lambda old: [*old, *theirs])
    edit(first, "val2017", annotations=lambda old: [r for r in old if r["image_id"] != 500] + ours)
    return {root.name: coco_set(root) for root in (first, second)}


def found(result: Converted) -> list[list[tuple[str, bool]]]:
    records = [r for r in result.splits["val"] if r.image.endswith((PICTURE, TWIN))]
    return [[(o.desc, bool(o.metadata.get("iscrowd"))) for o in r.objects] for r in records]


def convert(tmp_path: Path, sets: dict[str, Any], **config: Any) -> Converted:
    """The conversion, which must stop exactly if doctor reports it."""
    config = {"same_picture": "merge"} | config
    examined = examine(sets, records_config(**config), decode=False, workers=2)
    try:
        result = converted(tmp_path, sets, **config)
    except DataError:
        assert examined.stops
        raise
    assert not examined.stops, examined.findings
    return result


AGREEING = {
    "halves": ([annotation(1, 500, 1, LEFT)], [annotation(2, 700, 3, RIGHT)]),
    "one empty": ([annotation(1, 500, 1, LEFT), annotation(3, 500, 3, RIGHT)], []),
    "the same twice": (
        [annotation(1, 500, 1, LEFT), annotation(3, 500, 3, RIGHT)],
        [annotation(2, 700, 3, [40, 3, 20, 24.5]), annotation(4, 700, 1, LEFT)],
    ),
}


@pytest.mark.parametrize("one_set", [True, False], ids=["one set", "two sets"])
@pytest.mark.parametrize("case", AGREEING)
def test_compatible_records_are_joined(tmp_path, case, one_set):
    sets = two_sets(tmp_path, *(list(rows) for rows in AGREEING[case]), one_set)
    result = convert(tmp_path, sets)
    assert found(result) == [[("person", False), ("cat", False)]]
    assert result.drops()["val"]["picture_repeated"] == 1
    for policy in ("keep", "file"):
        assert len(found(convert(tmp_path, sets, same_picture=policy))) == 2


CONTRADICTING = {
    "other boxes": ([annotation(1, 500, 1, LEFT)], [annotation(2, 700, 1, [5, 5, 20, 25])], "boxes of IoU"),
    "other names": ([annotation(1, 500, 1, LEFT)], [annotation(2, 700, 3, LEFT)], "called 'person' and 'cat'"),
}


@pytest.mark.parametrize("one_set", [True, False], ids=["one set", "two sets"])
@pytest.mark.parametrize("case", CONTRADICTING)
def test_contradicting_records_stop_the_conversion(tmp_path, case, one_set):
    ours, theirs, words = CONTRADICTING[case]
    sets = two_sets(tmp_path, list(ours), list(theirs), one_set)
    with pytest.raises(DataError, match=f"{TWIN}.*has the content of .*{PICTURE}.*{words}"):
        convert(tmp_path, sets)
    result = convert(tmp_path, sets, same_picture="first")
    assert found(result) == [[("person", False)]]
    assert result.drops()["val"]["picture_left_out"] == 1
