"""Views of an image: boxes follow the pixels of their objects through every transformation."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coordexp.config.profile import RecordsConfig
from coordexp.errors import DataError
from coordexp.packing.pixels import load_sample_rgb
from coordexp.records.augment import augment, swap_sides
from coordexp.records.images import View, split_view
from coordexp.records.schema import ObjectRecord, Record, parse_record
from records_folders import coco_set, converted, records_config, write_split

SIZE = (80, 60)
BOX = (20, 12, 50, 40)


def scene() -> Image.Image:
    """A red rectangle at BOX on black."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = (255, 0, 0)
    return Image.fromarray(pixels)


def how(flip: float, crop: float, scale_jitter: float) -> RecordsConfig:
    return records_config(flip=float(flip), crop=float(crop), scale_jitter=scale_jitter)


def record(**metadata) -> Record:
    return Record("scene.png", *SIZE, (ObjectRecord("left cat", BOX),), metadata=metadata)


@pytest.mark.parametrize("seed", range(60))
def test_boxes_follow_the_pixels(tmp_path, seed):
    scene().save(tmp_path / "scene.png")
    changed = augment(record(), how(0.5, 0.7, 0.5 if seed % 2 else 0.0), random.Random(seed))
    parse_record(json.loads(json.dumps(changed.to_json())), "view")
    rgb = load_sample_rgb(tmp_path, changed.image, changed.width, changed.height)
    red = rgb[..., 0] > 127
    (obj,) = changed.objects
    ys, xs = np.nonzero(red)
    found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    tolerance = 1.0 if seed % 2 else 0.0  # because of the resizing in this test; otherwise exact
    np.testing.assert_allclose(obj.bbox_xyxy_px, found, atol=tolerance)
    assert obj.desc == ("right cat" if split_view(changed.image)[1].flip else "left cat")


def test_flipping_twice_is_the_identity():
    once = augment(record(), how(1.0, 0.0, 0.0), random.Random(0))
    assert once.image == "scene.png#flip"
    again = augment(Record("scene.png", *SIZE, once.objects), how(1.0, 0.0, 0.0), random.Random(0))
    assert again.objects == record().objects


def test_an_object_barely_inside_a_crop_becomes_an_ignore_region():
    corner = (0, 0, 24, 18)
    seen = set()
    for seed in range(300):
        whole = Record("scene.png", *SIZE, (ObjectRecord("cat", corner),))
        for obj in augment(whole, how(0.0, 1.0, 0.0), random.Random(seed)).objects:
            x1, y1, x2, y2 = obj.bbox_xyxy_px
            share = (x2 - x1) * (y2 - y1) / (corner[2] * corner[3])
            assert bool(obj.metadata.get("iscrowd")) == (share < 0.5)
            seen.add(share < 0.5)
    assert seen == {True, False}


def test_areas_scale_with_the_image_and_are_dropped_for_clipped_objects():
    small, wide = (30, 20, 40, 30), (0, 25, 80, 35)
    objects = (ObjectRecord("cat", small, area_px2=60.0), ObjectRecord("dog", wide, area_px2=500.0))
    seen = set()
    for seed in range(100):
        whole = Record("scene.png", *SIZE, objects)
        for obj in augment(whole, how(0.5, 0.5, 0.5), random.Random(seed)).objects:
            x1, y1, x2, y2 = obj.bbox_xyxy_px
            seen.add((obj.desc, obj.area_px2 is None))
            if obj.area_px2 is not None:
                share = 60.0 / 100.0 if obj.desc == "cat" else 500.0 / 800.0
                assert obj.area_px2 == pytest.approx(share * (x2 - x1) * (y2 - y1))
    assert seen >= {("cat", False), ("dog", False), ("dog", True)}


def test_phrases_are_not_cropped_and_follow_the_flip():
    changed = augment(record(phrase="the cat on the left"), how(1.0, 1.0, 0.0), random.Random(3))
    assert changed.metadata["phrase"] == "the cat on the right"
    assert split_view(changed.image)[1] == View(None, True)


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("the left cat", "the right cat"),
        ("Rightmost mug, left-hand side", "Leftmost mug, right-hand side"),
        ("LEFT of the right one", "RIGHT of the left one"),
        ("bright copyright leftovers", "bright copyright leftovers"),
        ("turning leftwards", "turning rightwards"),
    ],
)
def test_flipping_swaps_left_and_right_in_phrases(text, swapped):
    assert swap_sides(text) == swapped
    assert swap_sides(swapped) == text


crops = st.none() | st.tuples(*[st.integers(0, 5000)] * 4)


@given(st.text("ab/#&=.,0123flipcro", min_size=1).filter(lambda n: split_view(n)[0] == n), crops, st.booleans())
def test_names_and_views_round_trip(name, crop, flip):
    view = View(crop, flip)
    assert split_view(name + view.suffix()) == (name, view)


@pytest.mark.parametrize("name", ["a.jpg", "a#.jpg", "a#", "a#flipped", "flip", "a#crop=1,2,3"])
def test_ordinary_file_names_have_no_view(name):
    assert split_view(name) == (name, View())


def test_a_file_named_like_a_view_is_refused():
    with pytest.raises(DataError, match="named like a view"):
        augment(Record("a.jpg#flip", 8, 8, ()), how(1, 0, 0), random.Random(0))


def test_only_training_records_get_views_and_they_are_reproducible(tmp_path):
    write_split(tmp_path / "coco", "train2017", 100, 12)
    write_split(tmp_path / "coco", "val2017", 500, 6)
    sets, views_of = {"coco": coco_set(tmp_path / "coco", weight=3.0)}, {"flip": 0.5, "crop": 0.5, "scale_jitter": 0.2}
    one, two = (converted(tmp_path, sets, **views_of).splits for _ in range(2))
    assert one == two
    views = [split_view(r.image)[1] for r in one["train"]]
    assert {v.flip for v in views} == {True, False}
    assert {v.crop is None for v in views} == {True, False}
    assert all("#" not in r.image for split in ("dev", "val") for r in one[split])
    ids = [r.metadata["image_id"] for records in one.values() for r in records]
    assert len(set(ids)) == len(ids)
