"""Lost annotations stop convert and doctor by the same rule, before training."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coordexp import cli
from coordexp.config.profile import DatasetConfig
from coordexp.doctor.records import examine
from coordexp.errors import DataError
from coordexp.records.convert import FILE_POLICIES, Converted
from records_folders import annotation, coco_set, converted, dataset, edit, records_config, write_photos, write_split

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Twelve training and six val images of 64 x 48 px, with an object in the middle and one on the right."""
    root = tmp_path / "coco"
    for split, first, count in (("train2017", 100, 12), ("val2017", 500, 6)):
        write_split(root, split, first, count)
        change_each(root, split, lambda row: row.update(bbox=[20 + 20 * (row["id"] % 2), 10, 22, 30]))
    return root


def change_each(root: Path, split: str, change: Change) -> None:
    def changed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            change(row)
        return rows

    edit(root, split, annotations=changed)


def convert(tmp_path: Path, sets: Any, **config: Any) -> Converted:
    return converted(tmp_path, sets, **({"max_lost": 0.05} | config))


def stops(tmp_path: Path, sets: Any, **config: Any) -> str:
    """The error message of convert; doctor must stop for the same data, and pass if convert passes."""
    found = examine(sets, records_config(**({"max_lost": 0.05} | config)), decode=False, workers=2)
    try:
        convert(tmp_path, sets, **config)
    except DataError as error:
        assert found.stops
        return str(error)
    assert not found.stops, found.findings
    return ""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def command(coco: Path, tmp_path: Path, *more: object) -> tuple[object, ...]:
    file, images = coco / "annotations/instances_train2017.json", coco / "train2017"
    return ("convert", "--annotations", file, "--images", images, "--out", tmp_path / "r.jsonl", *more)


def scaled(row: dict[str, Any], by_width: float, by_height: float) -> None:
    x, y, w, h = row["bbox"]
    row["bbox"] = [x * by_width, y * by_height, w * by_width, h * by_height]


def as_corners(row: dict[str, Any]) -> None:
    x, y, w, h = row["bbox"]
    row["bbox"] = [x, y, x + w, y + h]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: scaled(row, 1000 / 64, 1000 / 48), "thousandths of the image"),
        (lambda row: scaled(row, 1 / 64, 1 / 48), "fractions of the image"),
        (as_corners, "look like x1, y1, x2, y2"),
        (lambda row: row.update(bbox="8 8 16 16"), 'bbox_malformed (bbox "8 8 16 16")'),
        (lambda row: row.update(image_id=row["image_id"] + 5000), "unknown_image (image_id 5"),
        (lambda row: row.update(iscrowd="maybe"), 'iscrowd_unknown (iscrowd "maybe")'),
        (lambda row: row.update(iscrowd=1), "set records.crowd to as_objects"),
    ],
    ids=["thousandths", "fractions", "corners", "malformed", "other ids", "crowd unknown", "all crowds"],
)
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_a_damaged_split_stops_with_the_likely_cause(coco, tmp_path, capfd, split, change, words):
    assert stops(tmp_path, {"coco": coco_set(coco)}) == ""
    change_each(coco, split, change)
    message = stops(tmp_path, {"coco": coco_set(coco)})
    assert message.startswith(f"coco/{split.removesuffix('2017')}: ")
    assert words in message
    if split == "train2017":
        assert run(*command(coco, tmp_path)) == 2
        said = capfd.readouterr().err
        assert words in said
        assert said.count("\n  ") == 3 or "as_objects" in words  # three examples
        assert not (tmp_path / "r.jsonl").exists()


def test_only_a_fraction_above_the_limit_stops(coco, tmp_path):
    edit(coco, "train2017", annotations=lambda old: [*old, *(annotation(i, 100, 1, [1, 1, 0, 5]) for i in range(6))])
    message = stops(tmp_path, {"coco": coco_set(coco)}, max_lost=0.19)
    assert (
        "coco/train: 6 of 30 annotations are lost (20.0%), records.max_lost allows 19.0%: bbox_too_thin 6." in message
    )
    assert message.count("bbox_too_thin (corners 1, 1, 1, 6, image 64 x 48 px)") == 3
    assert stops(tmp_path, {"coco": coco_set(coco)}, max_lost=0.2) == ""


def test_lost_images_are_limited_in_the_same_way(coco, tmp_path):
    for i in range(3):
        (coco / "train2017" / f"{100 + i:012d}.jpg").unlink()
    message = stops(tmp_path, {"coco": coco_set(coco)}, bad_images="drop")
    assert "coco/train: 3 of 12 images are lost (25.0%)" in message
    assert stops(tmp_path, {"coco": coco_set(coco)}, bad_images="drop", max_lost=0.3) == ""


def test_objects_dropped_by_a_policy_are_not_losses(coco, tmp_path):
    crowds = [annotation(7000 + i, 100 + i, 1, [2, 2, 60, 40], iscrowd=1) for i in range(10)]
    edit(coco, "train2017", annotations=lambda old: [*old, *crowds])
    assert stops(tmp_path, {"coco": coco_set(coco)}, crowd="drop", max_lost=0.0) == ""


def test_crowds_can_be_read_as_objects(coco, tmp_path, capfd):
    for split in ("train2017", "val2017"):
        change_each(coco, split, lambda row: row.update(iscrowd=1))
    result = convert(tmp_path, {"coco": coco_set(coco)}, crowd="as_objects")
    objects = [o for records in result.splits.values() for r in records for o in r.objects]
    assert (len(objects), [o for o in objects if o.metadata]) == (36, [])
    assert run(*command(coco, tmp_path, "--crowd", "as_objects")) == 0
    assert "24 objects, 0 of them crowd regions" in capfd.readouterr().out


def test_a_split_without_a_valid_object_stops(coco, tmp_path):
    edit(coco, "val2017", annotations=[])
    assert "val: no record has a valid object" in stops(tmp_path, {"coco": coco_set(coco)})


def test_a_set_of_empty_images_may_be_mixed_in(coco, tmp_path):
    write_split(tmp_path / "empty", "train2017", 900, 4)
    edit(tmp_path / "empty", "train2017", annotations=[])
    sets = {"coco": coco_set(coco), "empty": coco_set(tmp_path / "empty", val="none")}
    assert stops(tmp_path, sets, dev_images=6) == ""


def test_the_command_accepts_a_higher_limit(coco, tmp_path, capfd):
    edit(coco, "train2017", annotations=lambda old: [*old, *(annotation(i, 100, 9) for i in range(6))])
    assert run(*command(coco, tmp_path)) == 2
    assert "--max-lost" in capfd.readouterr().err
    assert run(*command(coco, tmp_path, "--max-lost", "0.5")) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "dropped: 6 boxes, unknown_category 6"
    assert sum("unknown_category (category_id 9)" in line for line in lines[:-1]) == 3


def test_the_default_limit_of_the_command_is_that_of_the_policies():
    assert inspect.signature(cli.convert).parameters["max_lost"].default == FILE_POLICIES.max_lost


def test_a_file_without_a_valid_line_is_an_error_with_the_reason(tmp_path, capfd):
    (tmp_path / "images").mkdir()
    lines = [{"messages": []}, {"images": ["a.png"], "width": 9, "height": 9, "objects": [{"desc": "x", "box": 1}]}]
    (tmp_path / "r.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    arguments = ("--annotations", tmp_path / "r.jsonl", "--images", tmp_path / "images", "--out", tmp_path / "o.jsonl")
    assert run("convert", "--source", "jsonl", *arguments) == 2
    message = capfd.readouterr().err
    assert "no valid object is left (record_invalid 2)" in message
    assert "unknown key 'messages'" in message


# Boxes in another form than the format's -----------------------------------------------------------------------------


def voc_from_0(root: Path) -> None:
    for file in (root / "Annotations").iterdir():
        text = file.read_text()
        for tag in ("xmin", "ymin"):
            value = text.split(f"<{tag}>")[1].split("<")[0]
            text = text.replace(f"<{tag}>{value}<", f"<{tag}>{int(value) - 3}<", 1)
        file.write_text(text)


def rewritten(root: Path, pattern: str, change: Callable[[str], str]) -> None:
    for file in root.rglob(pattern):
        file.write_text(change(file.read_text()))


def in_percent(text: str) -> str:
    return "\n".join(
        " ".join([n, *(f"{100 * float(v):.4f}" for v in vs)]) for n, *vs in map(str.split, text.splitlines())
    )


def in_pixels(text: str) -> str:
    lines = (line.split() for line in text.splitlines())
    return "\n".join(f"{n} {64 * float(x)} {48 * float(y)} {64 * float(w)} {48 * float(h)}" for n, x, y, w, h in lines)


def qwen_in_pixels(text: str) -> str:
    def smaller(found: re.Match[str]) -> str:
        x1, y1, x2, y2 = map(float, found[1].split(","))
        return f"[{x1 * 0.064}, {y1 * 0.048}, {x2 * 0.064}, {y2 * 0.048}]"

    return re.sub(r"\[([-\d., ]+)\]", smaller, text)


def table_in_thousandths(text: str) -> str:
    head, *rows = (line.split(",") for line in text.splitlines())
    for row in rows:
        row[4:8] = [str(float(v) * 1000 / (64, 48)[i % 2]) for i, v in enumerate(row[4:8])]
    return "\n".join(map(",".join, [head, *rows]))


FORMS: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    "VOC from 0": ("voc", voc_from_0, "pixels counted from 0", "from_0"),
    "YOLO in percent": ("yolo", lambda root: rewritten(root, "labels/*/*.txt", in_percent), "percent", ""),
    "YOLO in pixels": ("yolo", lambda root: rewritten(root, "labels/*/*.txt", in_pixels), "pixels", "pixels"),
    "Qwen in pixels": ("conversations", lambda root: rewritten(root, "*.jsonl", qwen_in_pixels), "pixels", "pixels"),
    "table in thousandths": (
        "csv", lambda root: rewritten(root, "*.csv", table_in_thousandths), "thousandths", "thousandths",
    ),
}  # fmt: skip


def big_pictures(root: Path, rows_of: Callable[[int], list[list[float]]]) -> dict[str, DatasetConfig]:
    """Twelve training and six val images of 1700 x 1600 px, nearly white, with boxes given by the image number."""
    for split, count in (("train2017", 12), ("val2017", 6)):
        write_split(root, split, 100 * len(split), count)
        rows = []
        for i, path in enumerate(sorted((root / split).iterdir())):
            Image.new("L", (1700, 1600), 255 - 10 * len(split) - i).save(path)
            rows += [annotation(100 * i + n, int(path.stem), 1, box) for n, box in enumerate(rows_of(i))]
        sizes = {"width": 1700, "height": 1600}
        edit(root, split, annotations=rows, images=lambda old: [row | sizes for row in old])  # noqa: B023
    return {"coco": coco_set(root)}


def test_boxes_only_in_the_corner_of_large_images_stop(tmp_path: Path) -> None:
    def boxes(i: int) -> list[list[float]]:
        return [[50 * i, 100, 300, 850], [200, 300, 500, 200]]

    message = stops(tmp_path, big_pictures(tmp_path / "coco", boxes))
    assert "all 24 boxes are in the upper left corner of their images" in message
    assert "look like thousandths of the image (0..1000); pixels are expected" in message
    shutil.rmtree(tmp_path / "coco")
    spread = big_pictures(tmp_path / "coco", lambda i: [*boxes(i), [900, 700, 700, 800]])
    assert stops(tmp_path, spread) == ""


def test_two_conventions_in_one_file_stop(coco: Path, tmp_path: Path) -> None:
    change_each(coco, "train2017", lambda row: as_corners(row) if row["id"] % 2 else row.update(bbox=[40, 30, 9, 8]))
    message = stops(tmp_path, {"coco": coco_set(coco)})
    assert "x1, y1, x2, y2, the others like x, y, width, height: two conventions in one file" in message


def test_doctor_reports_boxes_beyond_the_image(coco: Path, tmp_path: Path) -> None:
    change_each(coco, "train2017", lambda row: row.update(bbox=[40, 10, 40, 30]) if row["id"] == 1000 else None)
    assert stops(tmp_path, {"coco": coco_set(coco)}) == ""
    (noted,) = examine({"coco": coco_set(coco)}, records_config(), decode=False, workers=2).findings
    assert (noted.reason, noted.count, noted.fate) == ("boxes_reach_out", 1, "noted")
    assert noted.examples == ("annotation 1000: corners 40, 10, 80, 40, image 64 x 48 px",)


def test_boxes_of_images_that_were_scaled_down_stop(coco: Path, tmp_path: Path) -> None:
    """No box is lost, because each starts inside its image, and no other unit explains them."""
    change_each(coco, "train2017", lambda row: row.update(bbox=[30, 24, 36, 20] if row["id"] % 2 else [40, 5, 30, 45]))
    message = stops(tmp_path, {"coco": coco_set(coco)})
    assert "coco/train: 12 of 24 boxes extend beyond their images" in message
    assert "another unit, or sizes of other files" in message


@pytest.mark.parametrize("case", FORMS)
def test_boxes_in_another_form_stop_and_the_suggested_key_reads_them(case, tmp_path):
    fmt, change, words, form = FORMS[case]
    write_photos(fmt, tmp_path / "set", {"train": 12, "val": 6})
    assert stops(tmp_path, {"mine": dataset(fmt, tmp_path / "set")}) == ""
    change(tmp_path / "set")
    message = stops(tmp_path, {"mine": dataset(fmt, tmp_path / "set")})
    assert f"look like {words}" in message
    if form:
        assert f"boxes to {form}" in message
        assert stops(tmp_path, {"mine": dataset(fmt, tmp_path / "set", boxes=form)}) == ""
