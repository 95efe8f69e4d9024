"""YOLO folders: a `data.yaml` with names, images, and beside each image a label file of the same stem.

A label file is found by replacing the last `images` in the path by `labels`. A line is `class cx cy w h` in shares of
width and height, or `class x1 y1 x2 y2 x3 y3 ...` for a polygon. An image without a label file holds no object.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.config.loading import read_yaml
from coordexp.errors import DataError
from coordexp.records.categories import Category
from coordexp.records.image_files import IMAGE_SUFFIXES
from coordexp.records.sources.base import (
    Box,
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    is_finite,
)


def read(files: SplitFiles) -> Reading:
    """YOLO; the annotation file is the `data.yaml`, the image folder that of the split, such as `images/train`."""
    names = _names(files.path)
    folder = files.root / files.images
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected the images of the split.")
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    problems: list[Problem] = []
    categories = tuple(Category(number, name, "train") for number, name in sorted(names.items()))

    def read_images() -> Iterator[SourceImage]:
        for path in images:
            name = path.relative_to(files.root).as_posix()
            label = files.root / label_path(name)
            objects = tuple(_objects(label, names, problems)) if label.is_file() else ()
            yield SourceImage(name, name, None, None, None, objects, str(label))

    return Reading(read_images(), categories, problems)


def label_path(image_name: str) -> str:
    """ "images/train/1.jpg" -> "labels/train/1.txt"; without a folder `images`, the label lies beside the image."""
    parts = list(PurePosixPath(image_name).with_suffix(".txt").parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return "/".join(parts)


def _names(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise DataError(f"{path}: not found; expected the data.yaml of a YOLO data set.")
    names = read_yaml(path).get("names")
    listed: dict[Any, Any] = dict(enumerate(names)) if isinstance(names, list) else {}
    if isinstance(names, dict):
        listed = names
    valid = {key: str(name) for key, name in listed.items() if isinstance(key, int) and isinstance(name, str | int)}
    if not valid or len(valid) != len(listed):
        raise DataError(f"{path}: names is {names!r}; expected a list of names, or a mapping of numbers to names.")
    return valid


def _objects(path: Path, names: dict[int, str], problems: list[Problem]) -> Iterator[SourceObject]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        problems.append(Problem("label_unreadable", str(path), "file", str(error)))
        return
    for number, line in enumerate(lines, 1):
        values = _numbers(line)
        if not line.strip():
            continue
        if not values or values[0] not in names:
            reason = "unknown_category" if values else "bbox_malformed"
            problems.append(Problem(reason, str(path), f"line {number}", line[:80]))
            continue
        box, ring = _geometry(values[1:])
        yield SourceObject(names[int(values[0])], box, f"line {number}", in_unit_frame=True, rings=ring)


def _numbers(line: str) -> list[float]:
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        return []
    return values if all(map(is_finite, values)) else []


def _geometry(values: list[float]) -> tuple[Box | None, tuple[tuple[float, ...], ...]]:
    if len(values) == 4:
        cx, cy, w, h = values
        return (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), ()
    if len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = values[::2], values[1::2]
        return (min(xs), min(ys), max(xs), max(ys)), (tuple(values),)
    return None, ()
