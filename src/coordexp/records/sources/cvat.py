"""CVAT for images 1.1: one XML file, or a folder of them, with the boxes, polygons and masks of many images.

A rotated box is replaced by its tight box. Points, lines and tags have no box. If images specify a subset, those of
another split are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.records.categories import Category
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
from coordexp.records.sources.files import annotation_files, read_xml, stream_xml

LAYOUT = "CVAT's annotations.xml (CVAT for images 1.1)"
_SHAPES = ("box", "polygon", "ellipse", "mask", "cuboid", "polyline", "points", "skeleton")
_SUBSETS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read(files: SplitFiles) -> Reading:
    """Read CVAT; image names are relative to the image folder."""
    paths = annotation_files(files.path, (".xml",))
    if not paths or not files.path.exists():
        raise DataError(f"{files.path}: not found; expected {LAYOUT}.")
    names: dict[str, None] = {}
    for path in paths:
        names |= dict.fromkeys(_labels(path))
    categories = tuple(Category(number, name) for number, name in enumerate(names, 1))
    problems: list[Problem] = []

    def images() -> Iterator[SourceImage]:
        finder = ImageNames(files)
        for path in paths:
            for node in stream_xml(path, LAYOUT, "image"):
                if _SUBSETS.get((node.get("subset") or "").lower(), files.split) != files.split:
                    continue
                yield SourceImage(
                    file_name=finder.find(node.get("name")),
                    key=f"image {node.get('id', node.get('name'))}",
                    image_id=None,
                    width=as_number(node.get("width")),
                    height=as_number(node.get("height")),
                    objects=tuple(_object(shape, i) for i, shape in enumerate(node) if shape.tag in _SHAPES),
                    file=str(path),
                )

    return Reading(images(), categories, problems)


def _labels(path: Path) -> list[str]:
    """The declared labels of a file."""
    root = read_xml(path, LAYOUT)
    if root.tag != "annotations":
        raise DataError(f"{path}: its root is <{root.tag[:40]}>; expected {LAYOUT}.")
    if root.find("track") is not None and root.find("image") is None:
        raise DataError(f"{path}: contains tracks of a video; export the task as {LAYOUT}.")
    found = (label.findtext("name") for label in root.iter("label") if label.find("name") is not None)
    return [name.strip() for name in found if name and name.strip()]


def _object(shape: Element, index: int) -> SourceObject:
    box, ring = _geometry(shape)
    return SourceObject(
        desc=shape.get("label"),
        box_xyxy=box,
        key=f"{shape.tag} {index}",
        rings=(ring,) if ring and box else (),
        found="" if box else f"{shape.tag} without a box",
    )


def _numbers(shape: Element, *keys: str) -> list[float] | None:
    found = [as_number(shape.get(key)) for key in keys]
    return None if None in found else [v for v in found if v is not None]


def _geometry(shape: Element) -> tuple[Box | None, tuple[float, ...]]:
    if shape.tag == "box" and (corners := _numbers(shape, "xtl", "ytl", "xbr", "ybr")):
        return _turned(corners, as_number(shape.get("rotation")) or 0.0), ()
    if shape.tag == "ellipse" and (found := _numbers(shape, "cx", "cy", "rx", "ry")):
        x, y, rx, ry = found
        angle = math.radians(as_number(shape.get("rotation")) or 0.0)
        half_w = math.hypot(rx * math.cos(angle), ry * math.sin(angle))
        half_h = math.hypot(rx * math.sin(angle), ry * math.cos(angle))
        return (x - half_w, y - half_h, x + half_w, y + half_h), ()
    if shape.tag == "mask" and (found := _numbers(shape, "left", "top", "width", "height")):
        x, y, w, h = found
        return (x, y, x + w, y + h), ()
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";")]
        points = [as_number(v) for pair in pairs for v in pair if len(pair) == 2]
        ring = tuple(v for v in points if v is not None)
        if len(ring) == len(points) == 2 * len(pairs) and len(ring) >= 6:
            return around(ring), ring
    if shape.tag == "cuboid":
        corners8 = [f"{axis}{side}{i}" for i in (1, 2) for side in ("tl", "bl", "tr", "br") for axis in "xy"]
        if found := _numbers(shape, *corners8):
            return around(found), ()
    return None, ()


def _turned(corners: list[float], degrees: float) -> Box:
    """The tight box of a box that is rotated around its center."""
    x1, y1, x2, y2 = corners
    if not degrees:
        return x1, y1, x2, y2
    angle, cx, cy = math.radians(degrees), (x1 + x2) / 2, (y1 + y2) / 2
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    w, h = (x2 - x1) * cos + (y2 - y1) * sin, (x2 - x1) * sin + (y2 - y1) * cos
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
