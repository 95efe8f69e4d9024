"""The format, splits and images of a folder are recognized from its content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from coordexp.config.profile import DatasetConfig
from coordexp.records.convert import Converted
from coordexp.records.recognize import Candidate, recognize_folder
from records_folders import LAYOUTS, NAMES, converted, dataset, edit, picture, write_photos, write_split


def only(root: Path) -> Candidate:
    found = recognize_folder(root)
    assert len(found) == 1, found
    return found[0]


def objects(result: Converted) -> dict[str, int]:
    return {split: sum(len(r.objects) for r in records) for split, records in result.splits.items()}


def lost(result: Converted) -> int:
    return sum(map(len, result.problems.values()))


@pytest.mark.parametrize("fmt", sorted(LAYOUTS))
def test_every_format_is_recognized_with_its_splits(fmt, tmp_path):
    write_photos(fmt, tmp_path / "set", {"train": 8, "val": 4})
    found = only(tmp_path / "set")
    assert (found.format, found.problems) == (fmt, ()), found
    assert found.images == 12
    expected = converted(tmp_path / "a", {"mine": dataset(fmt, tmp_path / "set")})
    result = converted(tmp_path / "b", {"mine": found.dataset()})
    assert objects(result) == objects(expected)
    assert lost(result) == 0
    assert {c.name for c in result.categories()} <= set(NAMES)


def test_referring_expressions_are_recognized(tmp_path):
    write_photos("refcoco", tmp_path / "set", {"train": 8, "val": 4})
    found, _ = recognize_folder(tmp_path / "set")  # and its instances.json alone
    assert (found.format, found.keys["prompt"], found.images, found.problems) == ("refcoco", "phrase", 12, ())
    expected = converted(tmp_path / "a", {"mine": dataset("refcoco", tmp_path / "set", prompt="phrase")})
    assert objects(converted(tmp_path / "b", {"mine": found.dataset()})) == objects(expected)


@pytest.mark.parametrize("fmt", sorted(LAYOUTS))
def test_without_a_val_split_images_are_selected_by_content(fmt, tmp_path):
    write_photos(fmt, tmp_path / "set", {"train": 12})
    found = only(tmp_path / "set")
    assert (found.format, found.keys["val"]) == (fmt, "auto"), found
    result = converted(tmp_path / "a", {"mine": found.dataset()}, val_fraction=0.3)
    counts = {split: len(records) for split, records in result.splits.items()}
    assert sum(counts.values()) == 12
    assert 1 <= counts["val"] <= 8
    assert lost(result) == 0


# Layouts of programs --------------------------------------------------------------------------------------------------


def coco_files(root: Path, **splits: str) -> None:
    """A COCO file at each path, with images next to it, as Roboflow exports them."""
    for split, name in splits.items():
        write_split(root, f"{split}2017", 100 * len(split), 6)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        for image in (root / f"{split}2017").iterdir():
            shutil.move(image, (root / name).parent / image.name)
        shutil.move(root / "annotations" / f"instances_{split}2017.json", root / name)
        (root / f"{split}2017").rmdir()
    (root / "annotations").rmdir()


def test_coco_exported_by_roboflow_is_recognized(tmp_path):
    coco_files(tmp_path, train="train/_annotations.coco.json", val="valid/_annotations.coco.json")
    found = only(tmp_path)
    assert found.keys | {"root": ""} == {
        "format": "coco", "root": "", "weight": 1.0, "prompt": "open",
        "train": "train/_annotations.coco.json", "train_images": "train",
        "val": "valid/_annotations.coco.json", "val_images": "valid",
    }  # fmt: skip
    assert found.problems == ()


def test_coco_with_boxes_in_another_frame_is_recognized(tmp_path):
    def thousandths(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            x, y, w, h = row["bbox"]
            row["bbox"] = [x / 64 * 1000, y / 48 * 1000, w / 64 * 1000, h / 48 * 1000]
        return rows

    for split, first in (("train2017", 100), ("val2017", 500)):
        write_split(tmp_path / "set", split, first, 6)
        edit(tmp_path / "set", split, annotations=thousandths)
    found = only(tmp_path / "set")
    assert found.keys["boxes"] == "thousandths"
    assert "thousandths of the image" in found.problems[0]
    result = converted(tmp_path, {"mine": found.dataset()}, max_lost=0.0)
    (first, *_) = result.splits["val"]
    assert [tuple(round(v, 6) for v in o.bbox_xyxy_px) for o in first.objects] == [(2, 3, 22, 28), (11, 4, 31, 29)]


def test_hub_files_with_corners_are_recognized(tmp_path):
    write_photos("hub", tmp_path / "set", {"train": 8})
    for path in (tmp_path / "set/data").iterdir():
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            row["objects"]["bbox"] = [[x, y, x + w, y + h] for x, y, w, h in row["objects"]["bbox"]]
        pq.write_table(type(table).from_pylist(rows, table.schema), path)
    found = only(tmp_path / "set")
    assert (found.keys["boxes"], found.keys["train"], found.images) == ("corners", "data/train-*.parquet", 8)
    result = converted(tmp_path, {"mine": found.dataset()}, max_lost=0.0)
    assert {o.bbox_xyxy_px[2] for rs in result.splits.values() for r in rs for o in r.objects} == {30.0, 60.0}


def test_yolo_with_image_lists_and_labels_next_to_images_is_recognized(tmp_path):
    write_photos("yolo", tmp_path / "set", {"train": 8, "val": 4})
    root = tmp_path / "set"
    for split in ("train", "val"):
        for label in (root / "labels" / split).iterdir():
            shutil.move(label, root / "images" / split / label.name)
        names = sorted(p.name for p in (root / "images" / split).glob("*.jpg"))
        (root / f"{split}.txt").write_text("".join(f"./images/{split}/{name}\n" for name in names))
    (root / "data.yaml").write_text(
        f"path: ../datasets/mine\ntrain: train.txt\nval: /content/set/val.txt\nnames: {json.dumps(NAMES)}\n"
    )
    found = only(root)
    assert (found.keys["train_images"], found.keys["val"], found.problems) == (".", "data.yaml", ())
    result = converted(tmp_path, {"mine": found.dataset()})
    assert objects(result) == {"train": 12, "dev": 4, "val": 8}
    assert lost(result) == 0


def test_voc_in_one_folder_counting_from_zero_is_recognized(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(12):
        picture(i).save(root / f"my photo {i}.png")
        boxes = f"<xmin>{i % 3}</xmin><ymin>0</ymin><xmax>20</xmax><ymax>20</ymax>"
        shape = f"<object><name>cat</name><bndbox>{boxes}</bndbox></object>"
        text = f"<annotation><filename>IMG_{i}.JPG</filename>{shape}</annotation>"
        (root / f"my photo {i}.xml").write_text(text)
    found = only(root)
    assert (found.format, found.keys["boxes"], found.images) == ("voc", "from_0", 12)
    result = converted(tmp_path, {"mine": found.dataset()})
    assert objects(result)["train"] == 12 - 2 - len(result.splits["val"])
    assert {o.bbox_xyxy_px[0] for rs in result.splits.values() for r in rs for o in r.objects} == {0.0, 1.0, 2.0}


def test_other_folders_are_not_recognized(tmp_path):
    picture(1).save(tmp_path / "a.jpg")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "broken.json").write_bytes(b'{"images": [\xff')
    (tmp_path / "notes.yaml").write_text("a: [1\n")
    assert recognize_folder(tmp_path) == []


def test_a_candidate_is_a_valid_parameter_block(tmp_path):
    write_photos("csv", tmp_path, {"train": 4})
    assert isinstance(only(tmp_path).dataset(), DatasetConfig)
