"""Random views of a training image: flip, crop and scale, with exact boxes.

A view is part of the image's name in a record, `coco/train2017/1.jpg#crop=10,20,300,400&flip`. So it is chosen once, by
`convert`, and every reader of the image sees the same pixels. Scaling changes only the record's size and boxes, because
the image is resized to the model's input size for that size anyway.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

from coordexp.config.profile import RecordsConfig
from coordexp.errors import DataError
from coordexp.records.images import View, split_view
from coordexp.records.schema import ObjectRecord, Record

_SIDE = re.compile(r"\b(left|right)(?=\b|most\b|hand\b|wards?\b)", re.IGNORECASE)
SMALLEST_CROP = 0.6  # minimum fraction of each side
# An object with a smaller fraction of its box inside the crop becomes an ignore region: too little of it is visible to
# require its detection, too much to penalize it.
MIN_VISIBLE = 0.5


def augment(record: Record, config: RecordsConfig, rng: random.Random) -> Record:
    """A random view of a record. Images with phrases are not cropped: phrases can refer to positions.

    Raises:
        DataError: the image's own file name looks like that of a view.
    """
    if split_view(record.image)[0] != record.image:
        raise DataError(f"image {record.image!r} is named like a view of an image; rename the file.")
    crop, flip, scale = rng.random() < config.crop, rng.random() < config.flip, rng.uniform(-1, 1) * config.scale_jitter
    box = _random_crop(record, rng) if crop and "phrase" not in record.metadata else None
    out = cropped(record, box) if box else record
    if flip:
        out = _flipped(out)
    out = replace(out, image=record.image + View(box, flip).suffix())
    return _scaled(out, 1 + scale) if scale else out


def _random_crop(record: Record, rng: random.Random) -> tuple[int, int, int, int] | None:
    sides = [max(1, round(side * rng.uniform(SMALLEST_CROP, 1))) for side in (record.width, record.height)]
    x, y = rng.randint(0, record.width - sides[0]), rng.randint(0, record.height - sides[1])
    box = (x, y, x + sides[0], y + sides[1])
    return None if box == (0, 0, record.width, record.height) else box


def cropped(record: Record, crop: tuple[int, int, int, int]) -> Record:
    """The part of a record inside a crop (x1, y1, x2, y2 in pixels); barely visible objects become ignore regions."""
    left, top, right, bottom = crop
    objects = []
    for obj in record.objects:
        x1, y1, x2, y2 = obj.bbox_xyxy_px
        box = (max(x1, left) - left, max(y1, top) - top, min(x2, right) - left, min(y2, bottom) - top)
        width, height = box[2] - box[0], box[3] - box[1]
        if width < 1 or height < 1:
            continue
        is_seen = width * height >= MIN_VISIBLE * (x2 - x1) * (y2 - y1)
        metadata = _without_rings(obj) if is_seen else {**_without_rings(obj), "iscrowd": 1}
        # The part of a mask inside the crop is not known: for a clipped object, the area of the box is used.
        is_whole = left <= x1 and top <= y1 and x2 <= right and y2 <= bottom
        objects.append(ObjectRecord(obj.desc, box, None, metadata, obj.area_px2 if is_whole else None))
    return replace(record, width=right - left, height=bottom - top, objects=tuple(objects))


def _flipped(record: Record) -> Record:
    objects = []
    for obj in record.objects:
        x1, y1, x2, y2 = obj.bbox_xyxy_px
        box = (record.width - x2, y1, record.width - x1, y2)
        objects.append(ObjectRecord(swap_sides(obj.desc), box, None, _without_rings(obj), obj.area_px2))
    metadata = dict(record.metadata)
    if "phrase" in metadata:
        metadata["phrase"] = swap_sides(metadata["phrase"])
    objects.sort(key=lambda o: (o.bbox_xyxy_px[1], o.bbox_xyxy_px[0]))
    return replace(record, objects=tuple(objects), metadata=metadata)


def _scaled(record: Record, factor: float) -> Record:
    width, height = max(1, round(record.width * factor)), max(1, round(record.height * factor))
    fx, fy = width / record.width, height / record.height
    objects = []
    for obj in record.objects:
        x1, y1, x2, y2 = obj.bbox_xyxy_px
        box, area_px2 = (x1 * fx, y1 * fy, x2 * fx, y2 * fy), obj.area_px2
        scaled_px2 = None if area_px2 is None else area_px2 * fx * fy
        objects.append(ObjectRecord(obj.desc, box, None, _without_rings(obj), scaled_px2))
    return replace(record, width=width, height=height, objects=tuple(objects))


def _without_rings(obj: ObjectRecord) -> dict[str, Any]:
    return {key: value for key, value in obj.metadata.items() if key != "segmentation"}


def swap_sides(text: str) -> str:
    """ "the Left cat, rightmost" -> "the Right cat, leftmost"; other words, such as "bright", stay."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = "right" if word.lower() == "left" else "left"
        if word.isupper():
            return swapped.upper()
        return swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE.sub(other, text)
