"""COCO instances JSON, and what LVIS and Objects365 share with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.records.policy import Policies, refuse_bad_images, to_records
from coordexp.records.schema import Record
from coordexp.records.sources.base import (
    Category,
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    corners_of_xywh,
    polygon_rings,
    read_json,
)

LAYOUT = "COCO's instances layout"

__all__ = ["Category", "Conversion", "Instances", "load_instances", "read", "read_coco"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a source became: records in image-id order, categories, and drop counts by reason."""

    records: tuple[Record, ...]
    categories: tuple[Category, ...]
    drops: dict[str, int]


@dataclass(frozen=True, slots=True)
class Instances:
    """A checked instances file: annotations by image, the rest as problems."""

    path: Path
    images: dict[int | str, dict[str, Any]]
    categories: tuple[Category, ...]
    rows: dict[int | str, dict[str, Any]]  # the categories as they stand in the file
    annotations: dict[int | str, list[tuple[str, dict[str, Any]]]]  # image id -> (key, annotation)
    problems: list[Problem]

    def name_of(self, category_id: Any) -> str:
        """Name of a category that the file declares."""
        return str(self.rows[category_id]["name"])


def read(files: SplitFiles) -> Reading:
    """COCO: `file_name` is relative to the image folder."""
    instances = load_instances(files.path)
    return instances_reading(instances, lambda image: files.image_name(image["file_name"]))


def read_coco(annotations: Path, image_prefix: str) -> Conversion:
    """Convert one instances file; `image_prefix` is put before each file name (path relative to the image root).

    The default policies of `records.policy` hold: boxes are clipped to the image; a box is dropped, and counted, if it
    is not finite, thinner than 1 px after clipping, or of an unknown category or image. Crowd boxes are kept with
    `metadata.iscrowd` (ignored in training, ignore regions in evaluation). Objects are in reading order.

    Raises:
        DataError: naming the file and what is missing, or the images whose path or size cannot be used.
    """
    reading = instances_reading(load_instances(annotations), lambda image: f"{image_prefix}{image['file_name']}")
    result = to_records(reading, Policies())
    refuse_bad_images(result.bad_images)
    return Conversion(tuple(result.records), reading.categories, dict(Counter(p.reason for p in result.problems)))


def instances_reading(
    instances: Instances,
    image_name: Callable[[dict[str, Any]], object],
    image_metadata: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Reading:
    """The images of a loaded file in id order."""

    def images() -> Iterator[SourceImage]:
        for image_id in sorted(instances.images, key=lambda key: (isinstance(key, str), key)):
            image = instances.images[image_id]
            yield SourceImage(
                file_name=image_name(image),
                key=f"image {image_id}",
                image_id=image_id if isinstance(image_id, int) else None,
                width=image["width"],
                height=image["height"],
                objects=tuple(_to_object(key, a, instances) for key, a in instances.annotations.get(image_id, ())),
                file=str(instances.path),
                metadata=image_metadata(image) if image_metadata else {},
            )

    return Reading(images(), instances.categories, instances.problems)


def _to_object(key: str, annotation: dict[str, Any], instances: Instances) -> SourceObject:
    return SourceObject(
        desc=instances.name_of(annotation["category_id"]),
        box_xyxy=corners_of_xywh(annotation.get("bbox")),
        key=key,
        iscrowd=bool(annotation.get("iscrowd")),
        rings=polygon_rings(annotation.get("segmentation")),
    )


def load_instances(path: Path, image_keys: tuple[str, ...] = ("id", "file_name", "width", "height")) -> Instances:
    """Read and check the structure of an instances file; single annotations that fit nowhere become problems.

    Raises:
        DataError: a section is missing, or an image or category lacks a key, has it in a wrong type, or repeats an id.
    """
    source = read_json(path, LAYOUT)
    sections = source if isinstance(source, dict) else {}
    for section in ("images", "annotations", "categories"):
        if not isinstance(sections.get(section), list):
            raise DataError(f"{path}: no list {section!r}; expected {LAYOUT}.")
    images = _by_id(path, sections, "images", image_keys)
    rows = _by_id(path, sections, "categories", ("id", "name"))
    instances = Instances(path, images, _categories(path, rows), rows, defaultdict(list), [])
    seen: set[Any] = set()
    for i, annotation in enumerate(sections["annotations"]):
        _place(i, annotation, instances, seen)
    return instances


def _by_id(path: Path, source: dict[str, Any], section: str, keys: tuple[str, ...]) -> dict[int | str, dict[str, Any]]:
    entries: dict[int | str, dict[str, Any]] = {}
    for i, entry in enumerate(source[section]):
        where = f"{path}: {section}[{i}]"
        if not isinstance(entry, dict):
            raise DataError(f"{where} is {entry!r}; expected {LAYOUT}.")
        if absent := [key for key in keys if key not in entry]:
            raise DataError(f"{where} has no {absent}; expected {LAYOUT}.")
        kinds = {"id": (int, str), "file_name": (str,), "name": (str,), "width": (int, float), "height": (int, float)}
        for key in keys:
            if isinstance(entry[key], bool) or not isinstance(entry[key], kinds.get(key, (object,))):
                raise DataError(f"{where}.{key} is {entry[key]!r}; expected {LAYOUT}.")
        if entry["id"] in entries:
            raise DataError(f"{where}: id {entry['id']!r} repeats; expected each id once. Remove the duplicates.")
        entries[entry["id"]] = entry
    return entries


def _categories(path: Path, rows: dict[int | str, dict[str, Any]]) -> tuple[Category, ...]:
    if any(isinstance(key, str) for key in rows):
        raise DataError(f"{path}: category ids are text; expected whole numbers, as in {LAYOUT}.")
    return tuple(
        Category(int(key), str(row["name"]), "held_out" if row.get("supercategory") == "held_out" else "train")
        for key, row in rows.items()
    )


def _place(index: int, annotation: Any, instances: Instances, seen: set[Any]) -> None:
    """File one annotation under its image, or among the problems."""
    fields = annotation if isinstance(annotation, dict) else {}
    annotation_id = fields.get("id")
    key = f"annotations[{index}]" if annotation_id is None else f"annotation {annotation_id}"
    reason = ""
    if not _known(fields.get("image_id"), instances.images):
        reason = "unknown_image"
    elif not _known(fields.get("category_id"), instances.rows):
        reason = "unknown_category"
    elif isinstance(annotation_id, int | str):
        if annotation_id in seen:
            reason = "duplicate_id"
        seen.add(annotation_id)
    if reason:
        instances.problems.append(Problem(reason, str(instances.path), key))
    else:
        instances.annotations[fields["image_id"]].append((key, fields))


def _known(value: Any, table: dict[int | str, Any]) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool) and value in table
