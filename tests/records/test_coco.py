"""COCO instances to records: clipping, crowds, held-out names, drop reasons, and files that cannot be converted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pycocotools.mask import encode

from coordexp.errors import DataError
from coordexp.records.categories import Category
from coordexp.records.policy import RecordSet
from coordexp.records.schema import parse_record
from coordexp.records.sources import grouped
from coordexp.records.sources.base import SplitFiles
from coordexp.records.sources.coco import read
from records_folders import kept

IMAGES = [
    {"id": 9, "file_name": "b.jpg", "width": 100, "height": 80},
    {"id": 3, "file_name": "a.jpg", "width": 64, "height": 64},
]
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 5, "name": "lemon", "supercategory": "held_out"}]


def annotation(bbox: object, image_id: int = 9, category_id: int = 1, **more: object) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def write(folder: Path, **changes: object) -> Path:
    layout = {"images": IMAGES, "annotations": [], "categories": CATEGORIES} | changes
    path = folder / "instances.json"
    path.write_text(json.dumps({key: value for key, value in layout.items() if value is not ...}), encoding="utf-8")
    return path


def read_file(path: Path, **policies: object) -> RecordSet:
    return kept(read(SplitFiles(path.parent, path.name, "images/val", "val")), **policies)


def convert(folder: Path, *annotations: dict, **policies: object) -> RecordSet:
    return read_file(write(folder, annotations=list(annotations)), **policies)


def test_images_come_in_id_order_with_their_objects(tmp_path):
    result = convert(tmp_path, annotation([1, 2, 3, 4]), annotation([5, 6, 7, 8], image_id=3, category_id=5))
    assert [(r.image, r.width, r.height, r.metadata) for r in result.records] == [
        ("images/val/a.jpg", 64, 64, {"image_id": 3}),
        ("images/val/b.jpg", 100, 80, {"image_id": 9}),
    ]
    assert [[(o.desc, o.bbox_xyxy_px) for o in r.objects] for r in result.records] == [
        [("lemon", (5, 6, 12, 14))],
        [("cat", (1, 2, 4, 6))],
    ]
    assert result.drops == {}


def test_polygons_are_kept_on_request(tmp_path):
    row = annotation([10, 12, 20.5, 28], segmentation=[RING])
    for polygons, metadata in (("keep", {"segmentation": [RING]}), ("drop", {})):
        assert convert(tmp_path, row, polygons=polygons).records[1].objects[0].metadata == metadata


def test_categories_are_marked_by_their_presence_in_training(tmp_path):
    assert convert(tmp_path).categories == (Category(1, "cat", "train"), Category(5, "lemon", "held_out"))


@pytest.mark.parametrize(
    ("boxes_xywh", "expected_xyxy"),
    [
        (
            [[50, 30, 9, 9], [10, 30, 9, 9], [70, 5, 9, 9]],  # in reading order
            [(70, 5, 79, 14), (10, 30, 19, 39), (50, 30, 59, 39)],
        ),
        ([[-5, -6.5, 300, 20]], [(0, 0, 100, 13.5)]),  # clipped to the image
        ([[1.25, 2.5, 3.125, 4.0625]], [(1.25, 2.5, 4.375, 6.5625)]),  # fractions of pixels stay
    ],
)
def test_boxes_are_clipped_and_keep_fractions(tmp_path, boxes_xywh, expected_xyxy):
    objects = convert(tmp_path, *map(annotation, boxes_xywh)).records[1].objects
    assert [o.bbox_xyxy_px for o in objects] == expected_xyxy


@pytest.mark.parametrize(
    ("crowd", "metadata", "drops"),
    [("ignore", [{"iscrowd": 1}, {}], {}), ("drop", [{}], {"crowd": 1}), ("as_objects", [{}, {}], {})],
)
def test_crowds_become_ignore_regions_or_objects_or_are_dropped(tmp_path, crowd, metadata, drops):
    rows = [annotation([1, 1, 5, 5], iscrowd=1), annotation([1, 9, 5, 5], iscrowd=0)]
    result = convert(tmp_path, *rows, crowd=crowd)
    assert ([o.metadata for o in result.records[1].objects], result.drops) == (metadata, drops)


@pytest.mark.parametrize(("area", "expected"), [(7.25, 7.25), (0, 0.0), ("7.25", 7.25), (" 9 ", 9.0), ("1e1", 10.0)])
def test_areas_are_kept_as_annotated(tmp_path, area, expected):
    result = convert(tmp_path, annotation([1, 2, 3, 4], area=area))
    assert result.records[1].objects[0].area_px2 == expected
    assert result.drops == {}


@pytest.mark.parametrize(
    "area",
    [
        *("", "much", "nan", "inf", "1_0", "-3", "1e400", "9" * 5000),
        *(-0.5, 1e11, 10**400, float("nan"), float("inf"), True, [7], {"px": 7}),
    ],
    ids=lambda area: repr(area)[:9],
)
def test_an_invalid_area_is_counted_and_the_object_is_kept(tmp_path, area):
    result = convert(tmp_path, annotation([1, 2, 3, 4], area=area))
    assert [(o.bbox_xyxy_px, o.area_px2) for o in result.records[1].objects] == [((1, 2, 4, 6), None)]
    assert result.drops == {"area_invalid": 1}


def test_only_areas_that_differ_from_the_box_are_written(tmp_path):
    rows = [annotation([1, 2, 3, 4], area=12.0), annotation([1, 9, 3, 4]), annotation([9, 9, 3, 4], area=None)]
    result = convert(tmp_path, *rows, annotation([-5, 30, 15, 20], area=250))  # clipped
    objects = result.records[1].to_json()["objects"]
    assert ([o.get("area_px2") for o in objects], result.drops) == ([None, None, None, 250.0], {})


DROPPED = {
    "unknown_image": [
        *(annotation([1, 1, 5, 5], image_id=i) for i in (4, None, "nine", [9])),
        {"category_id": 1, "bbox": [1, 1, 5, 5]},
    ],
    "unknown_category": [
        *(annotation([1, 1, 5, 5], category_id=i) for i in (2, None, "1_0", [1])),
        {"image_id": 9, "bbox": [1, 1, 5, 5]},
    ],
    "bbox_malformed": [
        {"image_id": 9, "category_id": 1},
        *map(annotation, [None, "1,1,5,5", [1, 1, 5], [1, 1, 5, None], ["a", 1, 5, 5], [[1], 1, 5, 5]]),
        *map(annotation, [[1, 1, float("nan"), 5], [1, 1, 5, float("inf")]]),
    ],
    "bbox_too_thin": [
        *map(annotation, [[1, 1, 0.9, 5], [1, 1, 5, 0], [1, 1, -5, 5], [99.5, 1, 40, 5], [200, 1, 40, 5]])
    ],
    "bbox_outside": [annotation([90, 10, 60, 10])],
    "duplicate_object": [annotation([1, 2, 3, 4], id=5)],
}


@pytest.mark.parametrize("reason", DROPPED)
def test_every_dropped_box_has_one_reason(tmp_path, reason):
    result = convert(tmp_path, annotation([1, 2, 3, 4], id=1), *DROPPED[reason], min_inside=0.25)
    drops = dict(result.drops)
    lost_records = drops.pop("record_incomplete", 0)
    assert drops == {reason: len(DROPPED[reason])}
    objects = [o for r in result.records for o in r.objects]
    assert sum("lost" not in o.metadata for o in objects) == (0 if lost_records else 1)
    assert {o.metadata["iscrowd"] for o in objects if "lost" in o.metadata} <= {1}
    assert {p.file for p in result.problems} == {str(tmp_path / "instances.json")}
    assert all("annotation" in p.key or p.reason == "record_incomplete" for p in result.problems)


def test_every_annotation_is_an_object_or_a_drop_and_records_keep_the_contract(tmp_path):
    rng = np.random.default_rng(0)
    boxes = rng.uniform([-40, -40, -5, -5], [140, 140, 80, 80], (300, 4)).tolist()
    annotations = [
        annotation(box, image_id=int(rng.choice([3, 9, 77])), category_id=int(rng.choice([1, 5, 6]))) for box in boxes
    ]
    result = convert(tmp_path, *annotations)
    assert set(result.drops) == {"unknown_image", "unknown_category", "bbox_too_thin"}
    inside = [row for row in annotations if row["bbox"][0] < 60 and row["bbox"][1] < 60]
    result = convert(tmp_path, *(row | {"bbox": [max(0, v) for v in row["bbox"]]} for row in inside))
    objects = [o for r in result.records for o in r.objects]
    assert sum("lost" not in o.metadata for o in objects) + sum(result.drops.values()) == len(inside)
    assert {o.metadata["lost"] for o in objects if "lost" in o.metadata} == {"unknown_category", "bbox_too_thin"}
    for record in result.records:
        parse_record(json.loads(json.dumps(record.to_json())), "converted")


BROKEN = {
    "keys ['annotations'] are missing": {"annotations": ...},
    "images: ids repeat": {"images": [*IMAGES, IMAGES[0]]},
    "categories: ids repeat": {"categories": [*CATEGORIES, {"id": 1, "name": "dog"}]},
    "images[0] has no ['id']": {"images": [{"file_name": "b.jpg"}]},
    "images[0] has no ['file_name']": {"images": [{"id": 9, "width": 5, "height": 5}]},
    "categories[0] has no ['name']": {"categories": [{"id": 1}]},
    "keys ['categories'] are missing": {"categories": ..., "annotations": [{"id": 1, "caption": "a cat"}]},
    "images is null": {"images": None},
    "annotations is null": {"annotations": None},
    'categories is {"1": "cat"}': {"categories": {"1": "cat"}},
    "images[1] is null": {"images": [IMAGES[0], None]},
    "images[0].id is [9]": {"images": [IMAGES[0] | {"id": [9]}]},
    "images[1].file_name is null": {"images": [IMAGES[0], IMAGES[1] | {"file_name": None}]},
    "categories[1].id is [5]": {"categories": [CATEGORIES[0], {"id": [5], "name": "lemon"}]},
    'categories[0].name is " "': {"categories": [{"id": 1, "name": " "}]},
}


@pytest.mark.parametrize("found", BROKEN)
def test_unusable_entries_are_quoted_with_their_location(tmp_path, found):
    with pytest.raises(DataError, match=re.escape(f"instances.json: {found}") + ".* expected "):
        read_file(write(tmp_path, **BROKEN[found]))


@pytest.mark.parametrize("side", [0, -48, 79.5, True, float("nan"), "x"], ids=repr)
def test_an_impossible_image_size_drops_the_image(tmp_path, side):
    path = write(tmp_path, images=[IMAGES[0] | {"height": side}, IMAGES[1]])
    (record,) = kept(read(SplitFiles(tmp_path, path.name, ".", "val")), size=(64, 64)).records
    assert record.image == "a.jpg"


def test_a_file_that_is_not_utf8_is_an_error_with_its_name(tmp_path):
    path = tmp_path / "instances.json"
    path.write_bytes('{"images": "café"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"instances\.json: not JSON in UTF-8 .*0xe9.*expected a COCO instances file"):
        read_file(path)


def test_integers_written_as_floats_are_accepted(tmp_path):
    rows = [annotation([1, 2, 3, 4], image_id=9.0, category_id=1.0)]
    (record,) = read_file(write(tmp_path, images=[IMAGES[0] | {"id": 9.0, "width": 100.0}], annotations=rows)).records
    assert (record.width, type(record.width), len(record.objects)) == (100, int, 1)


NO, YES = (0, False, None, "0", "false"), (1, True, "1", " True ", "1.0")


@pytest.mark.parametrize("value", NO + YES, ids=repr)
def test_crowd_flags_are_read_in_their_usual_forms(tmp_path, value):
    (obj,) = convert(tmp_path, annotation([1, 1, 5, 5], iscrowd=value)).records[1].objects
    assert obj.metadata == ({"iscrowd": 1} if value in YES else {})


@pytest.mark.parametrize("value", [2, -1, 0.5, "", "no", "maybe", [], {}, float("nan")], ids=repr)
def test_an_invalid_crowd_flag_is_a_counted_problem(tmp_path, value):
    result = convert(tmp_path, annotation([1, 1, 5, 5], iscrowd=value), annotation([9, 9, 5, 5]))
    assert result.drops == {"iscrowd_unknown": 1}
    assert result.problems[0].detail.startswith("iscrowd ")
    region, obj = result.records[1].objects
    assert (region.metadata, obj.metadata) == ({"iscrowd": 1, "lost": "iscrowd_unknown"}, {})


def test_numbers_as_text_are_read_as_numbers(tmp_path):
    def as_text(value):
        return [str(v) for v in value] if isinstance(value, list) else str(value) if isinstance(value, int) else value

    rows = [annotation([1, 2, 3, 4], id=1), annotation([5, 6, 7, 8], image_id=3, category_id=5, id=2)]
    expected = convert(tmp_path, *rows)
    tables = {"images": IMAGES, "annotations": rows, "categories": CATEGORIES}
    texts = {name: [{k: as_text(v) for k, v in row.items()} for row in table] for name, table in tables.items()}
    result = read_file(write(tmp_path, **texts))
    assert (result.records, result.categories, result.drops) == (expected.records, expected.categories, {})
    repeated = read_file(write(tmp_path, annotations=[rows[0], rows[0] | {"id": "1"}]))
    assert repeated.drops == {"duplicate_object": 1}
    renumbered = read_file(write(tmp_path, annotations=[rows[0], rows[0] | {"bbox": [50, 50, 5, 5]}]))
    assert (renumbered.drops, len(renumbered.records[1].objects)) == ({}, 2)  # ids of annotations say nothing


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "0x10", "1_0", "", "1,5", "ten", None, True, [1]], ids=repr)
def test_text_that_is_not_a_plain_number_is_not_a_coordinate(tmp_path, text):
    assert convert(tmp_path, annotation([1, 1, text, 5])).drops == {"bbox_malformed": 1, "record_incomplete": 1}


RING = [10, 12, 30, 12, 30.5, 40, 10, 40]
OUTLINES = {
    "polygon": ([RING], (10, 12, 30.5, 40)),
    "two polygons": ([RING, [50, 5, 60, 5, 60, 9]], (10, 5, 60, 40)),
    "one ring without its list": (RING, (10, 12, 30.5, 40)),
    "run lengths": ({"size": [80, 100], "counts": [812, 28, 52, 28, 52, 28, 7000]}, (10, 12, 13, 40)),
}


@pytest.mark.parametrize("bbox", [..., None, [], [0, 0, 0, 0], "none"], ids=repr)
@pytest.mark.parametrize("outline", OUTLINES)
def test_a_missing_box_is_computed_from_the_segmentation(tmp_path, bbox, outline):
    segmentation, expected = OUTLINES[outline]
    row = annotation(bbox, segmentation=segmentation)
    if bbox is ...:
        del row["bbox"]
    result = convert(tmp_path, row)
    assert [o.bbox_xyxy_px for o in result.records[1].objects] == [expected]
    assert result.drops == {}


def test_compressed_run_lengths_give_the_same_box(tmp_path):
    mask = np.zeros((80, 100), np.uint8, order="F")
    mask[12:40, 10:13] = 1
    code = encode(mask)
    row = annotation([], segmentation={"size": code["size"], "counts": code["counts"].decode()})
    (obj,) = convert(tmp_path, row).records[1].objects
    assert obj.bbox_xyxy_px == (10, 12, 13, 40)


def test_an_annotated_box_is_not_changed(tmp_path):
    (obj,) = convert(tmp_path, annotation([1, 2, 3, 4], segmentation=[RING])).records[1].objects
    assert obj.bbox_xyxy_px == (1, 2, 4, 6)


@pytest.mark.parametrize(
    "segmentation",
    [
        None, 7, "x", [], [[]], [[1, 2, 3, 4]], [[1, 2, "a", 4, 5, 6]], {}, {"size": [80, 100]},
        {"size": [80], "counts": [8000]}, {"size": [80, 100], "counts": [1]}, {"size": [80, 100], "counts": [8000]},
        {"size": [80, 100], "counts": [-5, 8005]}, {"size": [80, 100], "counts": [0, "8000"]},
        {"size": [0, 100], "counts": []}, {"size": [80, 1e30], "counts": "0P2"},
        *({"size": [80, 100], "counts": text} for text in ("o" * 99, "\x00\xff", "", "~P2")),
    ],
    ids=repr,
)  # fmt: skip
def test_an_object_with_an_empty_segmentation_and_no_box_is_lost(tmp_path, segmentation):
    result = convert(tmp_path, annotation([], segmentation=segmentation))
    assert result.drops == {"bbox_malformed": 1, "record_incomplete": 1}
    assert [r.image for r in result.records] == ["images/val/a.jpg"]  # without it, "nothing is there" would be taught


def test_ids_may_be_text(tmp_path):
    images = [IMAGES[0] | {"id": "b7"}, IMAGES[1] | {"id": "a1"}]
    rows = [annotation([1, 2, 3, 4], image_id="b7", category_id="x"), annotation([5, 6, 7, 8], "a1", "x", id="u-1")]
    path = write(tmp_path, images=images, annotations=rows, categories=[{"id": "x", "name": "cat"}])
    result = read_file(path)
    assert [(r.image, len(r.objects), r.metadata) for r in result.records] == [
        ("images/val/a.jpg", 1, {"image_id": 1}), ("images/val/b.jpg", 1, {"image_id": 2}),
    ]  # fmt: skip
    assert result.categories == (Category(1, "cat", "train"),)


@pytest.mark.parametrize("order", [("annotations", "categories", "images"), ("categories", "annotations", "images")])
@pytest.mark.parametrize("limits", [(None, None), (0, 1), (300, 1)])
def test_section_order_and_memory_limit_do_not_change_the_result(tmp_path, monkeypatch, order, limits):
    rows = [annotation([i % 50, i % 40, 9, 9 + i % 7], image_id=(3, 9, 77)[i % 3], id=i) for i in range(60)]
    expected = convert(tmp_path, *rows)
    layout = json.loads((tmp_path / "instances.json").read_text())
    (tmp_path / "instances.json").write_text(json.dumps({key: layout[key] for key in order}))
    for key, value in zip(("BUFFER_BYTES", "BUCKET_GROUPS"), limits, strict=True):
        monkeypatch.setattr(grouped, key, getattr(grouped, key) if value is None else value)
    result = read_file(tmp_path / "instances.json")
    assert (result.records, result.problems) == (expected.records, expected.problems)
