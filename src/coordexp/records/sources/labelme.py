"""labelme: one JSON file per image, with shapes; the annotation file is a folder of them, or a single file.

`imagePath` is relative to the JSON file. Rectangles, polygons, circles, oriented rectangles and masks have a box;
points and lines have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.records.sources.base import (
    ImageNames,
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    around,
    as_number,
)
from coordexp.records.sources.files import annotation_files, read_json, shown

LAYOUT = "a JSON file of labelme, with shapes and imagePath"


def read(files: SplitFiles) -> Reading:
    """Read labelme; the image folder contains the images and often also the JSON files."""
    paths = annotation_files(files.path, (".json",))
    if not paths or not files.path.exists():
        raise DataError(f"{files.path}: not found; expected {LAYOUT}, or a folder of them.")
    is_one_file, names = files.path.is_file(), ImageNames(files)
    if is_one_file:
        _checked(paths[0])

    def parse(path: Path) -> SourceImage | Problem:
        try:
            source = _checked(path)
        except DataError as error:
            return Problem("annotation_unreadable", str(path), path.stem, str(error))
        below = "" if is_one_file else path.parent.relative_to(files.path).as_posix()
        return SourceImage(
            file_name=_image_name(source.get("imagePath"), path, below, names),
            key=path.stem,
            image_id=None,
            width=source.get("imageWidth"),
            height=source.get("imageHeight"),
            objects=tuple(_object(shape, i) for i, shape in enumerate(source["shapes"])),
            file=str(path),
        )

    return Reading(paths, (), [], parse)


def _checked(path: Path) -> dict[str, Any]:
    source = read_json(path, LAYOUT, _without_picture)
    if not isinstance(source, dict) or not isinstance(source.get("shapes"), list):
        raise DataError(f"{path}: has no list of shapes; expected {LAYOUT}.")
    return source


def _without_picture(row: dict[str, Any]) -> dict[str, Any]:
    """Drop `imageData`, which is the whole image as text."""
    row.pop("imageData", None)
    return row


def _image_name(name: Any, path: Path, below: str, names: ImageNames) -> object:
    """The image next to the JSON file or in the image folder; if `imagePath` is stale, the image with the same stem."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1] if isinstance(name, str) else f"{path.stem}.jpg"
    beside = f"{below}/{last}" if below not in ("", ".") else last
    found = names.find(beside)
    if isinstance(found, str) and names.exists(found):
        return found
    stem = str(names.files.image_name(f"{below}/{path.stem}" if below not in ("", ".") else path.stem))
    return names.of_stem(stem) or found


def _object(shape: Any, index: int) -> SourceObject:
    fields = shape if isinstance(shape, dict) else {}
    kind = fields.get("shape_type") or "polygon"
    points = _points(fields.get("points"))
    box = _box(kind, points)
    is_ring = kind in ("polygon", "rotation", "oriented_rectangle") and len(points) >= 3
    return SourceObject(
        desc=fields.get("label"),
        box_xyxy=box,
        key=f"shapes[{index}]",
        rings=(tuple(v for point in points for v in point),) if is_ring and box else (),
        found="" if box else f"shape_type {shown(kind)} with {len(points)} points",
    )


def _points(value: Any) -> list[tuple[float, float]]:
    found = []
    for point in value if isinstance(value, list) else []:
        x, y = (as_number(v) for v in point) if isinstance(point, list) and len(point) == 2 else (None, None)
        if x is None or y is None:
            return []
        found.append((x, y))
    return found


def _box(kind: Any, points: Sequence[tuple[float, float]]) -> Box | None:
    if kind == "circle" and len(points) == 2:
        (x, y), (x2, y2) = points
        radius = math.hypot(x2 - x, y2 - y)
        return x - radius, y - radius, x + radius, y + radius
    if (kind in ("rectangle", "mask") and len(points) in (2, 4)) or (
        kind in ("polygon", "rotation", "oriented_rectangle") and len(points) >= 3
    ):
        return around([v for point in points for v in point])
    return None
