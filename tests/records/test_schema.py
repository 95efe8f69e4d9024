"""The record contract: valid records, and an error with file and line for every kind of invalid record."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.errors import DataError
from coordexp.records.schema import ObjectRecord, Record, parse_record, read_records, write_records

CAT = {"desc": "black cat", "bbox_2d": [70.4, 148.8, 262.4, 338.4]}
GOOD = {"images": ["a/b.jpg"], "width": 640, "height": 480, "objects": [CAT]}
TOKENS = ["<|coord_110|>", "<|coord_310|>", "<|coord_410|>", "<|coord_705|>"]


def record_with(**changes) -> dict:
    return {key: value for key, value in (GOOD | changes).items() if value is not ...}


def object_with(**changes) -> dict:
    return record_with(objects=[{key: value for key, value in (CAT | changes).items() if value is not ...}])


def test_a_valid_record_is_read():
    record = parse_record(record_with(summary="a cat", metadata={"image_id": 7}), "f:1")
    cat = ObjectRecord("black cat", (70.4, 148.8, 262.4, 338.4))
    assert record == Record("a/b.jpg", 640, 480, (cat,), "a cat", {"image_id": 7})


def test_an_image_without_objects_is_a_record():
    assert parse_record(record_with(objects=[]), "f:1").objects == ()


def test_a_box_may_touch_all_borders():
    assert parse_record(object_with(bbox_2d=[0, 0, 640, 480]), "f:1").objects[0].bbox_xyxy_px == (0, 0, 640, 480)


def test_coordinate_tokens_become_pixels():
    record = parse_record(object_with(bbox_2d=TOKENS), "f:1")
    assert record.objects[0].bbox_xyxy_px == pytest.approx((70.4, 148.8, 262.4, 338.4))


def test_a_polygon_is_kept_and_its_tight_box_is_used():
    obj = parse_record(object_with(bbox_2d=..., poly=[10, 20, 50, 5, 30, 60]), "f:1").objects[0]
    assert obj.bbox_xyxy_px == (10, 5, 50, 60)
    assert obj.poly_px == (10, 20, 50, 5, 30, 60)


def test_areas_are_read_back_exactly(tmp_path):
    record = Record("a/b.jpg", 640, 480, (ObjectRecord("cat", (1, 2, 30, 40), area_px2=1023.9999999999999),))
    write_records(tmp_path / "r.jsonl", [record])
    assert next(read_records(tmp_path / "r.jsonl")).objects[0].area_px2 == 1023.9999999999999


BROKEN = {
    "not an object": ([1], "found a list"),
    "unknown key": (record_with(widht=3), "unknown key 'widht'. Did you mean 'width'?"),
    "no images": (record_with(images=...), "images is None"),
    "two images": (record_with(images=["a", "b"]), "exactly one"),
    "image is no path": (record_with(images=[3]), "exactly one"),
    "empty image path": (record_with(images=[""]), "exactly one"),
    "absolute image path": (record_with(images=["/etc/passwd"]), "leaves the image root"),
    "escaping image path": (record_with(images=["a/../../b.jpg"]), "leaves the image root"),
    "no width": (record_with(width=...), "width is None"),
    "width 0": (record_with(width=0), "width is 0"),
    "float height": (record_with(height=480.0), "height is 480.0"),
    "bool height": (record_with(height=True), "height is True"),
    "no objects": (record_with(objects=...), "objects is None"),
    "objects no list": (record_with(objects={}), "objects is {}"),
    "summary no string": (record_with(summary=["x"]), "summary is ['x']"),
    "metadata no object": (record_with(metadata=["x"]), "metadata is ['x']"),
    "object no object": (record_with(objects=["cat"]), "objects[0]: found a str"),
    "object metadata no object": (object_with(metadata="x"), "metadata is 'x'"),
    "line geometry": (object_with(bbox_2d=..., line=[1, 2, 3, 4]), "geometry 'line' is not supported"),
    "bbox instead of bbox_2d": (object_with(bbox_2d=..., bbox=[1, 2, 3, 4]), "geometry 'bbox' is not supported"),
    "unknown object key": (object_with(descr="x"), "unknown key 'descr'. Did you mean 'desc'?"),
    "no desc": (object_with(desc=...), "desc is None"),
    "blank desc": (object_with(desc="  "), "desc is '  '"),
    "desc no string": (object_with(desc=3), "desc is 3"),
    "desc with half a character": (object_with(desc="cat \ud83d"), "half of a surrogate pair"),
    "area no number": (object_with(area_px2="812"), "objects[0]: area_px2 is '812'"),
    "negative area": (object_with(area_px2=-1), "area_px2 is -1"),
    "area NaN": (object_with(area_px2=float("nan")), "NaN is not a number"),
    "no geometry": (object_with(bbox_2d=...), "geometry none"),
    "two geometries": (object_with(poly=[1, 2, 3, 4, 5, 6]), "exactly one of bbox_2d and poly"),
    "box no list": (object_with(bbox_2d="1,2,3,4"), "flat list"),
    "nested box": (object_with(bbox_2d=[[1, 2], [3, 4]]), "holds [1, 2]"),
    "three values": (object_with(bbox_2d=[1, 2, 3]), "has 3 values"),
    "five values": (object_with(bbox_2d=[1, 2, 3, 4, 5]), "has 5 values"),
    "bool value": (object_with(bbox_2d=[True, 2, 30, 40]), "holds True"),
    "null value": (object_with(bbox_2d=[None, 2, 30, 40]), "holds None"),
    "NaN": (object_with(bbox_2d=[float("nan"), 2, 30, 40]), "NaN is not a number"),
    "infinity": (object_with(bbox_2d=[1, 2, float("inf"), 40]), "Infinity is not a number"),
    "beyond float": (object_with(bbox_2d=[1, 2, 10**400, 40]), "401 digits"),
    "x2 = x1": (object_with(bbox_2d=[30, 2, 30, 40]), "empty or outside the 640x480"),
    "y2 < y1": (object_with(bbox_2d=[1, 50, 30, 40]), "empty or outside"),
    "negative": (object_with(bbox_2d=[-0.5, 2, 30, 40]), "empty or outside"),
    "right of the image": (object_with(bbox_2d=[1, 2, 640.5, 40]), "empty or outside"),
    "flat polygon": (object_with(bbox_2d=..., poly=[1, 2, 3, 2, 5, 2]), "empty or outside"),
    "two-point polygon": (object_with(bbox_2d=..., poly=[1, 2, 3, 4]), "has 4 values"),
    "odd polygon": (object_with(bbox_2d=..., poly=[1, 2, 3, 4, 5, 6, 7]), "has 7 values"),
    "token and float": (object_with(bbox_2d=[*TOKENS[:3], 40]), "mixes"),
    "no such token": (object_with(bbox_2d=[*TOKENS[:3], "<|coord_1000|>"]), "mixes"),
    "number in quotes": (object_with(bbox_2d=["1", "2", "3", "4"]), "mixes"),
    "both forms": (record_with(objects=[CAT, CAT | {"bbox_2d": TOKENS}]), "use one form per record"),
}


@pytest.mark.parametrize(("row", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_errors_of_invalid_records_name_file_and_line(tmp_path, row, message):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "line", [b"", b"  ", b'{"images": ["a"', b'{"desc": "caf\xe9"}', b"NaN,", b"not json"], ids=repr
)
def test_errors_of_invalid_lines_name_file_and_line(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(GOOD).encode() + b"\n")
    with pytest.raises(DataError, match=r"train\.jsonl:2: "):
        list(read_records(path))


def test_records_before_an_invalid_one_are_read(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{\n", encoding="utf-8")
    reader = read_records(path)
    assert next(reader).image == "a/b.jpg"
    with pytest.raises(DataError):
        next(reader)


pixels = st.integers(0, 479_000).map(lambda v: v / 1000)


@st.composite
def records(draw):
    def box():
        x1, y1 = draw(pixels), draw(pixels)
        return x1, y1, draw(st.floats(x1 + 0.01, 640)), draw(st.floats(y1 + 0.01, 480))

    words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10).filter(str.strip)
    marks = st.sampled_from([{}, {"iscrowd": 1}])
    objects = tuple(ObjectRecord(draw(words), box(), None, draw(marks)) for _ in range(draw(st.integers(0, 3))))
    return Record("a.png", 640, 480, objects, draw(st.none() | st.just("two things")), {"image_id": 5})


@settings(max_examples=30)
@given(st.lists(records(), max_size=4))
def test_write_and_read_round_trip(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    assert write_records(path, written) == len(written)
    for read, record in zip(read_records(path), written, strict=True):
        assert (read.image, read.width, read.height) == (record.image, record.width, record.height)
        assert (read.summary, read.metadata) == (record.summary, record.metadata)
        for a, b in zip(read.objects, record.objects, strict=True):
            assert (a.desc, a.metadata) == (b.desc, b.metadata)
            assert a.bbox_xyxy_px == pytest.approx(
                b.bbox_xyxy_px, abs=5.1e-4
            )  # rounded to a thousandth of a pixel in the file


def test_a_polygon_survives_the_round_trip(tmp_path):
    record = parse_record(object_with(bbox_2d=..., poly=[10, 20, 50, 5, 30, 60]), "f:1")
    write_records(tmp_path / "r.jsonl", [record])
    assert list(read_records(tmp_path / "r.jsonl")) == [record]
