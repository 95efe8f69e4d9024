"""COCO instances JSON, and what LVIS and Objects365 share with it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.records.categories import Category
from coordexp.records.policy import Policies, refuse_bad_images, to_records
from coordexp.records.schema import Record
from coordexp.records.sources.base import (
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    corners_of_xywh,
    is_whole,
    polygon_rings,
    read_json,
)

LAYOUT = "COCO's instances layout"
# What every entry must have: key -> is it a whole number (else a name).
_FIELDS = {
    "images": {"id": True, "file_name": False, "width": True, "height": True},
    "categories": {"id": True, "name": False},
}


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
    images: dict[int, dict[str, Any]]
    categories: tuple[Category, ...]
    rows: dict[int, dict[str, Any]]  # the categories as they stand in the file
    annotations: dict[int, list[tuple[str, dict[str, Any]]]]  # image id -> (key, annotation)
    problems: list[Problem]

    def name_of(self, category_id: Any) -> str:
        """Name of a category that the file declares."""
        return str(self.rows[category_id]["name"])


def read(files: SplitFiles) -> Reading:
    """COCO: `file_name` is relative to the image folder."""
    instances = load_instances(files.path, polygons=files.polygons)
    return instances_reading(instances, lambda image: files.image_name(image["file_name"]))


def read_coco(annotations: Path, image_prefix: str) -> Conversion:
    """Convert one instances file; `image_prefix` is put before each file name (path relative to the image root).

    The default policies of `records.policy` hold: boxes are clipped to the image; a box is dropped, and counted, if it
    is not finite, thinner than 1 px after clipping, or of an unknown category or image. Crowd boxes are kept with
    `metadata.iscrowd` (ignored in training, ignore regions in evaluation). Objects are in reading order.

    Raises:
        DataError: naming the file and what is missing, or the images whose path or size cannot be used.
    """
    instances = load_instances(annotations, strict=True, polygons=False)
    reading = instances_reading(instances, lambda image: f"{image_prefix}{image['file_name']}")
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
        for image_id in sorted(instances.images):
            image = instances.images[image_id]
            yield SourceImage(
                file_name=image_name(image),
                key=f"image {image_id}",
                image_id=image_id,
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
        area_px2=annotation.get("area"),
    )


def load_instances(path: Path, names_images: bool = True, strict: bool = False, polygons: bool = True) -> Instances:
    """Read and check an instances file; single annotations that fit nowhere become problems.

    Args:
        path: the file.
        names_images: each image must have a `file_name` (LVIS has urls instead).
        strict: sizes that cannot be, and annotations that are no objects, are errors too; else they become problems.
        polygons: read `segmentation` as well.

    Raises:
        DataError: naming the file, and the entry that is missing or has no valid id, name or size.
    """
    source = read_json(path, "a COCO instances file", unread="" if polygons else "segmentation")
    missing = {"images", "annotations", "categories"} - set(source if isinstance(source, dict) else ())
    if missing:
        raise DataError(f"{path}: keys {sorted(missing)} are missing; expected {LAYOUT}.")
    for section in ("images", "annotations", "categories"):
        skipped = {"file_name"} if section == "images" and not names_images else set()
        _check_section(source[section], section, f"{path}: {section}", skipped, strict)
    images = {int(image["id"]): image for image in source["images"]}
    rows = {int(row["id"]): row for row in source["categories"]}
    categories = tuple(
        Category(key, row["name"], "held_out" if row.get("supercategory") == "held_out" else "train")
        for key, row in rows.items()
    )
    instances = Instances(path, images, categories, rows, defaultdict(list), [])
    seen: set[Any] = set()
    for i, annotation in enumerate(source["annotations"]):
        _place(i, annotation, instances, seen)
    return instances


def _check_section(entries: Any, section: str, where: str, skipped: set[str], strict: bool) -> None:
    if not isinstance(entries, list):
        raise DataError(f"{where} is {_shown(entries)}, expected a list, as in {LAYOUT}. Export it again.")
    if section == "annotations" and not strict:
        return
    fields = {key: whole for key, whole in _FIELDS.get(section, {}).items() if key not in skipped}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(
                f"{where}[{i}] is {_shown(entry)}, expected an object. Remove it, or export the file again."
            )
        if absent := [key for key in fields if key not in entry]:
            raise DataError(f"{where}[{i}] has no {absent}; expected {LAYOUT}.")
        for key, whole in fields.items():
            _check_value(entry[key], key, whole, f"{where}[{i}].{key}", strict)
    if fields and len({entry["id"] for entry in entries}) != len(entries):
        raise DataError(f"{where}: ids repeat, expected each id once. Remove the duplicates.")


def _check_value(value: Any, key: str, whole: bool, where: str, strict: bool) -> None:
    is_size = key in ("width", "height")
    if is_size and not strict:  # left to records.policy, which finds all of them
        return
    if whole and not (is_whole(value) and (not is_size or value > 0)):
        wanted = "a size in whole pixels" if is_size else "a whole number"
        raise DataError(f"{where} is {_shown(value)}, expected {wanted}. Correct or remove it.")
    if not whole and not (isinstance(value, str) and value.strip()):
        raise DataError(f"{where} is {_shown(value)}, expected a name. Correct or remove it.")


def _shown(value: Any) -> str:
    """A JSON value as a message quotes it: as JSON writes it, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _place(index: int, annotation: Any, instances: Instances, seen: set[Any]) -> None:
    """File one annotation under its image, or among the problems."""
    fields = annotation if isinstance(annotation, dict) else {}
    annotation_id = fields.get("id")
    key = f"annotations[{index}]" if annotation_id is None else f"annotation {annotation_id}"
    reason = ""
    if not _declared(fields.get("image_id"), instances.images):
        reason = "unknown_image"
    elif not _declared(fields.get("category_id"), instances.rows):
        reason = "unknown_category"
    elif isinstance(annotation_id, int | str):
        if annotation_id in seen:
            reason = "duplicate_id"
        seen.add(annotation_id)
    if reason:
        instances.problems.append(Problem(reason, str(instances.path), key))
    else:
        instances.annotations[fields["image_id"]].append((key, fields))


def _declared(value: Any, table: dict[int, dict[str, Any]]) -> bool:
    return is_whole(value) and value in table
