"""COCO instances JSON, and what LVIS and Objects365 share with it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.records.categories import Category
from coordexp.records.policy import Policies, RecordSet, refuse_bad_images, to_records
from coordexp.records.schema import as_flag
from coordexp.records.sources.base import (
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    as_number,
    as_whole,
    corners_of_xywh,
    read_json,
)
from coordexp.records.sources.segmentation import polygon_rings, tight_box

LAYOUT = "COCO's instances layout"
# What every entry must have: key -> is it a whole number (else a name).
_FIELDS = {
    "images": {"id": True, "file_name": False, "width": True, "height": True},
    "categories": {"id": True, "name": False},
}


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


def read_coco(annotations: Path, image_prefix: str, policies: Policies | None = None) -> RecordSet:
    """Convert one instances file; `image_prefix` is put before each file name (path relative to the image root).

    Records are in image-id order, objects in reading order. Boxes are clipped to the image; a box is dropped, and
    counted, if it is not finite, too thin after clipping, or of an unknown category or image.

    Raises:
        DataError: naming the file and what is missing, or the images whose path or size cannot be used.
    """
    instances = load_instances(annotations, strict=True, polygons=False)
    reading = instances_reading(instances, lambda image: f"{image_prefix}{image['file_name']}")
    result = to_records(reading, policies or Policies())
    refuse_bad_images(result.bad_images)
    return result


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
    box, iscrowd = annotated_box(annotation), as_flag(annotation.get("iscrowd"))
    unclear = "bbox" if box is None else "iscrowd" if iscrowd is None else ""
    return SourceObject(
        desc=instances.name_of(annotation["category_id"]),
        box_xyxy=box,
        key=key,
        iscrowd=iscrowd,
        rings=polygon_rings(annotation.get("segmentation")),
        category_id=annotation["category_id"],
        found=f"{unclear} {_shown(annotation.get(unclear))}" if unclear else "",
        area_px2=annotation.get("area"),
    )


def annotated_box(annotation: dict[str, Any]) -> Box | None:
    """The box of an annotation; where `bbox` is missing, no box or a point, the one around its `segmentation`."""
    box = corners_of_xywh(annotation.get("bbox"))
    if box is None or box[:2] == box[2:]:
        return tight_box(annotation.get("segmentation")) or box
    return box


def _without_outline(row: dict[str, Any]) -> dict[str, Any]:
    """`segmentation` is most of a file's bytes: it stays only where the box has to be taken from it."""
    if "segmentation" in row:
        box = corners_of_xywh(row.get("bbox"))
        if box is not None and box[:2] != box[2:]:
            del row["segmentation"]
    return row


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
    source = read_json(path, "a COCO instances file", None if polygons else _without_outline)
    missing = {"images", "annotations", "categories"} - set(source if isinstance(source, dict) else ())
    if missing:
        raise DataError(f"{path}: keys {sorted(missing)} are missing; expected {LAYOUT}.")
    for section in ("images", "annotations", "categories"):
        skipped = {"file_name"} if section == "images" and not names_images else set()
        _check_section(source[section], section, f"{path}: {section}", skipped, strict)
    images = {image_id: _with_size(image) for image_id, image in _by_id(source["images"])}
    rows = dict(_by_id(source["categories"]))
    categories = tuple(
        Category(key, row["name"], "held_out" if row.get("supercategory") == "held_out" else "train")
        for key, row in rows.items()
    )
    instances = Instances(path, images, categories, rows, defaultdict(list), [])
    seen: set[Any] = set()
    for i, annotation in enumerate(source["annotations"]):
        _place(i, annotation, instances, seen)
    return instances


def _by_id(entries: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Checked entries with their ids, which some tools write as text."""
    return ((number, entry) for entry in entries if (number := as_whole(entry["id"])) is not None)


def _with_size(image: dict[str, Any]) -> dict[str, Any]:
    """The image with a size that is written as text as numbers."""
    written = {key: as_number(image[key]) for key in ("width", "height") if isinstance(image[key], str)}
    sides = {key: number for key, number in written.items() if number is not None}
    return image | sides if sides else image


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
    if fields and len(dict(_by_id(entries))) != len(entries):
        raise DataError(f"{where}: ids repeat, expected each id once. Remove the duplicates.")


def _check_value(value: Any, key: str, whole: bool, where: str, strict: bool) -> None:
    is_size = key in ("width", "height")
    if is_size and not strict:  # left to records.policy, which finds all of them
        return
    number = as_whole(value)
    if whole and (number is None or (is_size and number <= 0)):
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
    image_id, category_id = as_whole(fields.get("image_id")), as_whole(fields.get("category_id"))
    reason = detail = ""
    if image_id is None or image_id not in instances.images:
        reason, detail = "unknown_image", f"image_id {_shown(fields.get('image_id'))}"
    elif category_id is None or category_id not in instances.rows:
        reason, detail = "unknown_category", f"category_id {_shown(fields.get('category_id'))}"
    else:
        number = as_whole(annotation_id)
        known = annotation_id if number is None else number
        if isinstance(known, int | str):
            reason = "duplicate_id" if known in seen else ""
            seen.add(known)
        if not reason:
            # In place, and as numbers: a file may hold a million of them, some as text.
            fields["image_id"], fields["category_id"] = image_id, category_id
            instances.annotations[image_id].append((key, fields))
    if reason:
        instances.problems.append(Problem(reason, str(instances.path), key, detail))
