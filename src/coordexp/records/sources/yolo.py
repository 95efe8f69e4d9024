"""YOLO folders: a `data.yaml` with names, images, and one label file per image with the same stem.

A label file is found by replacing the last `images` in the path with `labels`, or is next to the image. A line is
`class cx cy w h` in fractions of width and height (in predictions, followed by a confidence), or `class x1 y1 x2 y2 x3
y3 ...` for a polygon. If the data.yaml has a `kpt_shape`, keypoints follow the box; they are ignored. An image without
a label file has no objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box, as_boxes, pairwise_iou
from coordexp.records.categories import Category
from coordexp.records.image_files import IMAGE_SUFFIXES, files_below
from coordexp.records.sources.base import (
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    around,
    is_finite,
)
from coordexp.records.sources.files import is_readable, read_text, read_yaml, shown

LAYOUT = "the data.yaml of a YOLO data set, or a classes.txt with one name per line"
POSE_IOU = 0.6  # IoU of the box with the tight box of its keypoints; real polygons reach about 0.5
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}


def read(files: SplitFiles) -> Reading:
    """Read YOLO; the annotation file is the `data.yaml`, the image folder that of the split, such as `images/train`.

    If the image folder is the root, the `data.yaml` specifies the images of the split: one folder, several folders, or
    a text file that lists the images.
    """
    described = _described(files.path)
    names, key_points = _names(described, files.path), _key_points(described, files.path)
    places = _places(files, described)
    if not places:
        raise DataError(f"{files.root / files.images}: no such folder; expected the images of the split.")
    categories = tuple(Category(number, name, "train") for number, name in sorted(names.items()))
    labels, others = _labels(files, places)

    def parse(entry: tuple[str, Path]) -> SourceImage:
        name, label = entry
        try:
            objects = tuple(_objects(label, names, key_points)) if label.exists() else ()
            return SourceImage(name, name, None, None, None, objects, str(label))
        except DataError as error:
            return SourceImage(
                name, name, None, None, None, (), str(label), problem="label_unreadable", detail=str(error)
            )

    return Reading(labels.items(), categories, list(_unused(others, names)), parse)


def read_from(files: SplitFiles) -> list[Path]:
    """All files with annotations of the split, including label files without an image."""
    places = _places(files, _described(files.path))
    labels, others = _labels(files, places)
    return [files.path, *(p for p in places if not p.is_dir()), *labels.values(), *others]


def _labels(files: SplitFiles, places: list[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Image -> path of its label file, existing or not, in the order of names; and label files without an image."""
    images = sorted({path for place in places for path in _images_of(place, files.root)})
    labels = {name: _label(files.root, name) for name in images}
    known = set(labels.values())
    found = {path for place in places if place.is_dir() for path in _label_files(place, files.root)}
    return labels, sorted(found - known)


def _places(files: SplitFiles, described: dict[str, Any]) -> list[Path]:
    """Image folders, and text files that list images."""
    folder = files.root / files.images
    if folder.resolve() in (files.path.parent.resolve(), files.root.resolve()):
        key = next((key for key in _SPLITS[files.split] if described.get(key)), None)
        if key is not None:
            return [_own_place(str(value), files, described) for value in _listed(described[key])]
    return [folder] if folder.is_dir() else []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _own_place(value: str, files: SplitFiles, described: dict[str, Any]) -> Path:
    """The location below the root for a path in the data.yaml, whose first parts are often from another machine."""
    parts = [part for part in value.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    home = files.path.parent
    starts = [home, files.root]
    if isinstance(described.get("path"), str):
        starts.insert(0, home / described["path"].replace("\\", "/"))
    for i in range(len(parts)):
        for start in starts:
            place = Path(os.path.normpath(start.joinpath(*parts[i:])))  # not resolve(): a link may lead out of the root
            if place.exists() and place.is_relative_to(files.root):
                return place
    raise DataError(
        f"{files.path}: lists the images {shown(value)}, which are not below {files.root}; expected them there."
    )


def _images_of(place: Path, root: Path) -> Iterator[str]:
    """Image names relative to the root, from a folder or from a text file that lists them."""
    if place.is_dir():
        found = (p for p in files_below(place) if p.suffix.lower() in IMAGE_SUFFIXES)
        yield from (path.relative_to(root).as_posix() for path in found)
        return
    for line in read_text(place, "a list of image files, one per line").splitlines():
        parts = [part for part in line.strip().replace("\\", "/").split("/") if part not in ("", ".", "..")]
        if parts:
            names = ["/".join(parts[i:]) for i in range(len(parts))]
            here = [(start, name) for name in names for start in (place.parent, root)]
            known = (s / n for s, n in here if is_readable(s / n))
            found_path = next(known, root / names[0])
            yield found_path.relative_to(root).as_posix()


def _label(root: Path, name: str) -> Path:
    """The label file of an image: below `labels`, or next to the image; its suffix may be uppercase."""
    usual, beside = root / label_path(name), root / PurePosixPath(name).with_suffix(".txt")
    places = (place.with_suffix(suffix) for suffix in (".txt", ".TXT") for place in (usual, beside))
    return next((place for place in places if place.exists()), usual)


def _label_files(place: Path, root: Path) -> Iterator[Path]:
    """All text files that may have labels for the images of a folder."""
    image = (place.relative_to(root) / "image").as_posix()
    for folder in dict.fromkeys((place, (root / label_path(image)).parent)):
        yield from (p for p in files_below(folder) if p.suffix.lower() == ".txt")


def label_path(image_name: str) -> str:
    """ "images/train/1.jpg" -> "labels/train/1.txt"; without a folder `images`, the label is next to the image."""
    parts = list(PurePosixPath(image_name).with_suffix(".txt").parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return "/".join(parts)


def _described(path: Path) -> dict[str, Any]:
    """The content of the annotation file; a plain list of names means the classes."""
    if path.suffix.lower() in (".txt", ".names"):
        return {"names": [line.strip() for line in read_text(path, LAYOUT).splitlines() if line.strip()]}
    return read_yaml(path, LAYOUT)


def _names(described: dict[str, Any], path: Path) -> dict[int, str]:
    names = described.get("names")
    listed: dict[Any, Any] = dict(enumerate(names)) if isinstance(names, list) else {}
    if isinstance(names, dict):
        listed = {int(key) if isinstance(key, str) and key.isdecimal() else key: name for key, name in names.items()}
    valid = {key: str(name) for key, name in listed.items() if type(key) is int and isinstance(name, str | int | float)}
    if not valid or len(valid) != len(listed):
        raise DataError(
            f"{path}: names is {shown(names, 200)}; expected a list of names, or a mapping of numbers to names."
        )
    return valid


def _key_points(described: dict[str, Any], path: Path) -> int:
    """Number of keypoint values after each box: the product of `kpt_shape`, 0 without one."""
    shape = described.get("kpt_shape")
    if shape is None:
        return 0
    match shape:
        case [int(count), 2 | 3 as values] if count > 0:
            return count * values
    raise DataError(f"{path}: kpt_shape is {shown(shape)}; expected [number of key points, 2 or 3].")


def _unused(labels: Iterable[Path], names: dict[int, str]) -> Iterator[Problem]:
    """A problem for each label file that has objects, but no image."""
    for path in labels:
        try:
            lines = read_text(path, "labels").splitlines()
        except DataError:
            continue  # not a label file, but a list of classes or a readme
        count = sum(bool(values) and len(values) >= 5 and values[0] in names for values in map(_numbers, lines))
        if count:
            detail = f"{count} objects; no image has its labels here (docs/data.md: where labels lie)"
            yield Problem("label_unused", str(path), "file", detail)


def _objects(path: Path, names: dict[int, str], key_points: int) -> Iterator[SourceObject]:
    for number, line in enumerate(read_text(path, "labels").splitlines(), 1):
        if not line.strip():
            continue
        values = _numbers(line)
        box, ring = _geometry(values[1:], key_points)
        is_known = bool(values) and values[0] in names
        yield SourceObject(
            desc=names[int(values[0])] if is_known else None,
            box_xyxy=box,
            key=f"line {number}",
            rings=ring,
            side_units=1.0,
            category_id=int(values[0]) if is_known else None,
            problem="" if is_known else "unknown_category" if values else "bbox_malformed",
            found="" if box and is_known else line[:80] + (": neither a box nor clearly a polygon" if is_known else ""),
        )


def _numbers(line: str) -> list[float]:
    try:
        values = [float(word) for word in line.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        return []
    return values if all(map(is_finite, values)) else []


def _geometry(values: list[float], key_points: int) -> tuple[Box | None, tuple[tuple[float, ...], ...]]:
    """Box and polygons from the numbers after the class; no box if the line is neither."""
    has_confidence = len(values) == 5 and 0 <= values[4] <= 1 and not key_points
    if len(values) == 4 or has_confidence or (key_points and len(values) == 4 + key_points):
        cx, cy, w, h = values[:4]
        return (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), ()
    if key_points or len(values) < 6 or len(values) % 2 or _is_pose(values):
        return None, ()
    return around(values), (tuple(values),)


def _is_pose(values: list[float]) -> bool:
    """Whether the first four numbers are a box around the following points, so that the line is not a polygon.

    Keypoints may have a visibility of 2, which is not a fraction of a side. The first corner of a polygon is on its
    outline, so a box centered there covers only a small part of the polygon.
    """
    if max(values[4:]) > 1.5 and max(values[:4]) <= 1:
        return True
    points = [v for pair in zip(values[4::2], values[5::2], strict=True) if any(pair) for v in pair]  # 0 0: not labeled
    if len(points) < 4:
        return False
    box, _ = _geometry(values[:4], 0)
    return bool(pairwise_iou(as_boxes([box]), as_boxes([around(points)]))[0, 0] > POSE_IOU)
