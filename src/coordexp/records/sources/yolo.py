"""YOLO folders: a `data.yaml` with names, images, and beside each image a label file of the same stem.

A label file is found by replacing the last `images` in the path by `labels`. A line is `class cx cy w h` in fractions
of width and height, `class x1 y1 x2 y2 x3 y3 ...` for a polygon, or, where the data.yaml has a `kpt_shape`, a box with
key points behind it, which are left out. An image without a label file holds no object.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.config.loading import read_yaml
from coordexp.errors import DataError
from coordexp.geometry.boxes import Box, as_boxes, pairwise_iou
from coordexp.records.categories import Category
from coordexp.records.image_files import IMAGE_SUFFIXES
from coordexp.records.sources.base import (
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    around,
    is_finite,
    read_text,
)

POSE_IOU = 0.6  # of the box and the one around its key points; real polygons reach about .5


def read(files: SplitFiles) -> Reading:
    """YOLO; the annotation file is the `data.yaml`, the image folder that of the split, such as `images/train`."""
    names, key_points = _names(files.path), _key_points(files.path)
    folder = files.root / files.images
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected the images of the split.")
    found = list(_files_below(folder))
    images = sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES)
    problems: list[Problem] = []
    categories = tuple(Category(number, name, "train") for number, name in sorted(names.items()))

    def read_images() -> Iterator[SourceImage]:
        labels: set[Path] = set()
        for path in images:
            name = path.relative_to(files.root).as_posix()
            label = files.root / label_path(name)
            labels.add(label)
            objects = tuple(_objects(label, names, key_points, problems)) if label.is_file() else ()
            yield SourceImage(name, name, None, None, None, objects, str(label))
        beside = (files.root / label_path((PurePosixPath(files.images) / "image").as_posix())).parent
        others = {*found, *_files_below(beside)} - labels
        problems.extend(_unused(sorted(p for p in others if p.suffix == ".txt"), names))

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


def _key_points(path: Path) -> int:
    """How many numbers of key points stand behind each box: the product of `kpt_shape`, 0 without one."""
    shape = read_yaml(path).get("kpt_shape")
    if shape is None:
        return 0
    match shape:
        case [int(count), 2 | 3 as values] if count > 0:
            return count * values
    raise DataError(f"{path}: kpt_shape is {shape!r}; expected [number of key points, 2 or 3].")


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, linked folders included, except where a link leads back up."""
    for place, folders, names in os.walk(folder, followlinks=True):
        if Path(place).resolve() in {parent.resolve() for parent in Path(place).parents}:
            folders.clear()
        else:
            yield from (Path(place) / name for name in names)


def _unused(labels: Iterable[Path], names: dict[int, str]) -> Iterator[Problem]:
    """A problem for each label file that holds objects and belongs to no image."""
    for path in labels:
        try:
            lines = read_text(path, "labels").splitlines()
        except DataError:
            continue  # no label file: a list of classes, a readme
        count = sum(bool(values) and len(values) >= 5 and values[0] in names for values in map(_numbers, lines))
        if count:
            detail = f"{count} objects; no image has its labels here (docs/data.md: where labels lie)"
            yield Problem("label_unused", str(path), "file", detail)


def _objects(path: Path, names: dict[int, str], key_points: int, problems: list[Problem]) -> Iterator[SourceObject]:
    try:
        lines = read_text(path, "labels").splitlines()
    except DataError as error:
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
        box, ring = _geometry(values[1:], key_points)
        category = int(values[0])
        yield SourceObject(
            desc=names[category],
            box_xyxy=box,
            key=f"line {number}",
            rings=ring,
            in_unit_frame=True,
            category_id=category,
            found="" if box else f"{line[:80]}: neither a box nor clearly a polygon",
        )


def _numbers(line: str) -> list[float]:
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        return []
    return values if all(map(is_finite, values)) else []


def _geometry(values: list[float], key_points: int) -> tuple[Box | None, tuple[tuple[float, ...], ...]]:
    """Box and polygons of the numbers behind the class; no box where the line is neither."""
    if len(values) == 4 or (key_points and len(values) == 4 + key_points):
        cx, cy, w, h = values[:4]
        return (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), ()
    if key_points or len(values) < 6 or len(values) % 2 or _is_pose(values):
        return None, ()
    return around(values), (tuple(values),)


def _is_pose(values: list[float]) -> bool:
    """Whether the first four numbers are a box around the points behind them, so that the line is no polygon.

    Key points may have a visibility of 2, which is no fraction of a side. The first corner of a polygon lies on its
    outline, so a box that has its center there covers little of the polygon.
    """
    if max(values[4:]) > 1.5 and max(values[:4]) <= 1:
        return True
    points = [v for pair in zip(values[4::2], values[5::2], strict=True) if any(pair) for v in pair]  # 0 0: not labeled
    if len(points) < 4:
        return False
    box, _ = _geometry(values[:4], 0)
    return bool(pairwise_iou(as_boxes([box]), as_boxes([around(points)]))[0, 0] > POSE_IOU)
