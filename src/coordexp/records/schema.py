"""The record contract: one JSON line per image.

    {"images": ["a.jpg"], "width": 640, "height": 480,
     "objects": [{"desc": "black cat", "bbox_2d": [x1, y1, x2, y2], "area_px2": 812.5} | {"desc": ..., "poly": [...]}],
     "summary": "...", "metadata": {...}}

Coordinates are pixel floats in [0, W] x [0, H], or coordinate tokens; one record never mixes both. A `poly` is trained
and evaluated by its tight box. `line` is refused. `area_px2` is optional: the area of the object's mask, by which COCO
distinguishes small, medium and large objects; without it, the area of the box is used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.errors import DataError, closest
from coordexp.geometry.bins import COORD_PATTERN, decode_norm
from coordexp.infra.files import replacing
from coordexp.infra.foreign import Gate

RECORDS = Gate("one JSON record per line", DataError, "Convert again, or correct the line.")
RECORD_KEYS = {"images", "width", "height", "objects", "summary", "metadata"}
OBJECT_KEYS = {"desc", "bbox_2d", "poly", "area_px2", "metadata"}
REMOVED_GEOMETRY = {"line", "line_points", "bbox", "polygon"}
_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
LARGEST_AREA_PX2 = 1e5**2  # upper end of COCO's largest area band; an object above it would be in no band


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """One annotated object: description and geometry (float pixels).

    `area_px2` is the annotated area of the mask; None if there is none, or if it equals that of the box.
    """

    desc: str
    bbox_xyxy_px: tuple[float, float, float, float]
    poly_px: tuple[float, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    area_px2: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One image and its objects."""

    image: str
    width: int
    height: int
    objects: tuple[ObjectRecord, ...]
    summary: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record in the contract's JSON form, coordinates as pixel floats."""
        objects = []
        for obj in self.objects:
            row: dict[str, Any] = {"desc": obj.desc}
            if obj.poly_px is None:
                row["bbox_2d"] = [round(v, 3) for v in obj.bbox_xyxy_px]
            else:
                row["poly"] = [round(v, 3) for v in obj.poly_px]
            if obj.area_px2 is not None:
                row["area_px2"] = obj.area_px2  # not rounded: it decides the size band
            if obj.metadata:
                row["metadata"] = obj.metadata
            objects.append(row)
        out: dict[str, Any] = {"images": [self.image], "width": self.width, "height": self.height, "objects": objects}
        if self.summary is not None:
            out["summary"] = self.summary
        if self.metadata:
            out["metadata"] = self.metadata
        return out


def parse_record(row: Any, where: str) -> Record:
    """Check one decoded JSON line against the contract.

    Args:
        row: the decoded JSON value.
        where: "file:line", for messages.

    Raises:
        DataError: the message states the place, what was found and what was expected.
    """
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: found a {type(row).__name__}, expected a JSON object with keys {sorted(RECORD_KEYS)}."
        )
    for key in row:
        if key not in RECORD_KEYS:
            raise DataError(
                f"{where}: unknown key {key!r}.{closest(key, RECORD_KEYS)} Valid keys: {sorted(RECORD_KEYS)}."
            )
    images = row.get("images")
    if not (isinstance(images, list) and len(images) == 1 and isinstance(images[0], str) and images[0]):
        raise DataError(f"{where}: images is {images!r}, expected a list with exactly one relative image path.")
    path = PurePosixPath(images[0])
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: image path {images[0]!r} leaves the image root; use a relative path without '..'.")
    width, height = (_positive_int(row.get(key), f"{where}: {key}") for key in ("width", "height"))
    if not isinstance(row.get("objects"), list):
        raise DataError(f"{where}: objects is {row.get('objects')!r}, expected a list (it may be empty).")
    parsed = [_parse_object(obj, width, height, f"{where}: objects[{i}]") for i, obj in enumerate(row["objects"])]
    if len({is_token for _, is_token in parsed}) > 1:
        raise DataError(
            f"{where}: some boxes are pixel floats and some are coordinate tokens; use one form per record."
        )
    summary, metadata = row.get("summary"), _metadata(row.get("metadata"), where)
    if summary is not None and not isinstance(summary, str):
        raise DataError(f"{where}: summary is {summary!r}, expected a string or nothing.")
    return Record(images[0], width, height, tuple(obj for obj, _ in parsed), summary, metadata)


def _parse_object(obj: Any, width: int, height: int, where: str) -> tuple[ObjectRecord, bool]:
    if not isinstance(obj, dict):
        raise DataError(f"{where}: found a {type(obj).__name__}, expected an object with desc and bbox_2d.")
    for key in obj:
        if key in REMOVED_GEOMETRY:
            raise DataError(
                f"{where}: geometry {key!r} is not supported; give bbox_2d [x1, y1, x2, y2] or poly [x1, y1, ...]."
            )
        if key not in OBJECT_KEYS:
            raise DataError(
                f"{where}: unknown key {key!r}.{closest(key, OBJECT_KEYS)} Valid keys: {sorted(OBJECT_KEYS)}."
            )
    desc = obj.get("desc")
    if not isinstance(desc, str) or not desc.strip() or any("\ud800" <= char <= "\udfff" for char in desc):
        raise DataError(f"{where}: desc is {desc!r}, expected a non-empty string of valid Unicode.")
    box, poly, is_token = _geometry(obj, width, height, where)
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise DataError(
            f"{where}: box {box} is empty or outside the {width}x{height} image; expected 0 <= x1 < x2 <= W; y alike."
        )
    metadata = _metadata(obj.get("metadata"), where)
    if "iscrowd" in metadata:
        metadata["iscrowd"] = int(checked_flag(metadata["iscrowd"], f"{where}.metadata.iscrowd"))
    area_px2 = checked_area_px2(obj.get("area_px2"), where)
    return ObjectRecord(desc, (x1, y1, x2, y2), poly, metadata, area_px2), is_token


def _geometry(
    obj: dict[str, Any], width: int, height: int, where: str
) -> tuple[list[float], tuple[float, ...] | None, bool]:
    """Tight box [x1, y1, x2, y2], the polygon if there is one, and whether coordinates were written as tokens."""
    present = [key for key in ("bbox_2d", "poly") if key in obj]
    if len(present) != 1:
        raise DataError(f"{where}: has geometry {present or 'none'}, expected exactly one of bbox_2d and poly.")
    values, is_token = _coordinates(obj[present[0]], width, height, f"{where}.{present[0]}")
    if present[0] == "bbox_2d":
        if len(values) != 4:
            raise DataError(f"{where}.bbox_2d: has {len(values)} values, expected 4: [x1, y1, x2, y2].")
        return values, None, is_token
    if len(values) < 6 or len(values) % 2:
        raise DataError(f"{where}.poly: has {len(values)} values, expected an even number of at least 6.")
    return [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])], tuple(values), is_token


def as_flag(value: Any) -> bool | None:
    """A boolean from 0, 1, true, false, one of these as text, or null (which means False); None if it is invalid."""
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None
    return _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None


def checked_flag(value: Any, where: str) -> bool:
    """`as_flag` of a value that must be valid; raises DataError with `where`."""
    flag = as_flag(value)
    if flag is None:
        raise DataError(f"{where} is {value!r}, expected 0 or 1.")
    return flag


def checked_area_px2(value: Any, where: str) -> float | None:
    """The area of an object in one of our own files, None if there is none; raises DataError with `where`."""
    if value is None:
        return None
    if not is_area_px2(value):
        raise DataError(
            f"{where}: area_px2 is {value!r}, expected a number of square pixels from 0 to {LARGEST_AREA_PX2:g}. "
            "Correct it, or omit it: then the area of the box is used."
        )
    return float(value)


def is_area_px2(value: Any) -> bool:
    """Whether a value can be the area of an object; true and false cannot."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST_AREA_PX2


def _metadata(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise DataError(f"{where}: metadata is {value!r}, expected an object or nothing.")
    return dict(value or {})


def _coordinates(values: Any, width: int, height: int, where: str) -> tuple[list[float], bool]:
    if not isinstance(values, list):
        raise DataError(f"{where}: found {values!r}, expected a flat list of coordinates.")
    tokens = [isinstance(v, str) for v in values]
    if any(tokens):
        if not all(tokens) or not all(COORD_PATTERN.fullmatch(v) for v in values):
            raise DataError(
                f"{where}: mixes coordinate tokens and other values: {values!r}; expected only tokens or only floats."
            )
        bins = [int(COORD_PATTERN.fullmatch(v)[1]) for v in values]  # type: ignore[index]
        return [float(c) * (height if i % 2 else width) for i, c in enumerate(decode_norm(bins))], True
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, float)) or not abs(v) <= sys.float_info.max:
            raise DataError(f"{where}: holds {v!r}, expected finite numbers in pixels.")
    return [float(v) for v in values], False


def _positive_int(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise DataError(f"{where} is {value!r}, expected a positive integer (pixels).")
    return value


def read_records(path: Path) -> Iterator[Record]:
    """Yield the checked records of a JSONL file; raises DataError with file and line at the first invalid one."""
    for where, line in RECORDS.lines(path):
        if not line.strip():
            raise DataError(f"{where}: empty line, expected one JSON record per line.")
        yield parse_record(RECORDS.parse_json(line, where), where)


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write records as JSONL and return their number."""
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json_line(record))
            count += 1
    return count


def json_line(record: Record) -> str:
    """A record as a line of JSON."""
    return json.dumps(record.to_json(), ensure_ascii=False) + "\n"
