"""COCO instances JSON, what LVIS shares with it, and Objects365.

Objects365 v2 has file names that are not where the downloaded patches unpack to: `zhiyuan_objv2_train.json` says
`images/v1/patch8/objects365_v1_00420917.jpg`, the archive `patch8.tar.gz` unpacks to
`patch8/objects365_v1_00420917.jpg`. So the last two parts of the name count, below the image folder of the set.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.records.categories import Category, as_split
from coordexp.records.schema import as_flag
from coordexp.records.sources.base import (
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    around,
    as_number,
    as_whole,
    corners_of_xywh,
    is_finite,
    is_whole,
    read_json,
)

LAYOUT = "COCO's instances layout"
# What every entry must have, and what that is; sizes are left to records.policy, which finds all that cannot be.
_FIELDS = {
    "images": {"id": "a whole number", "file_name": "a name", "width": "", "height": ""},
    "categories": {"id": "a whole number", "name": "a name"},
}
MAX_SIDE_PX = 1 << 20
# The alphabet of compressed counts. The last character must end a number: pycocotools would read on behind the text.
_COMPRESSED = re.compile(r"[0-o]*[0-O]")


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


def read_objects365(files: SplitFiles) -> Reading:
    """Objects365 v2; the image folder is the one that holds `patch0`, `patch1`, ..."""
    instances = load_instances(files.path, polygons=files.polygons)
    return instances_reading(instances, lambda image: files.image_name(patch_path(image["file_name"])))


def patch_path(file_name: str) -> str:
    """ "images/v2/patch43/objects365_v2_00908726.jpg" -> "patch43/objects365_v2_00908726.jpg"."""
    parts = file_name.split("/")
    return "/".join(parts[-2:]) if len(parts) >= 2 and parts[-2].startswith("patch") else file_name


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


def polygon_rings(value: Any) -> tuple[tuple[float, ...], ...]:
    """COCO's polygon form, also a single ring without its list; a run-length mask or anything else gives no ring."""
    if not isinstance(value, list):
        return ()
    rings = [value] if value and not isinstance(value[0], list) else value
    return tuple(
        tuple(float(v) for v in ring)
        for ring in rings
        if isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 and all(map(is_finite, ring))
    )


def tight_box(value: Any) -> Box | None:
    """The box around a `segmentation`, in pixels; None where it is empty or neither polygons nor a run-length mask."""
    if isinstance(value, dict):
        return _mask_box(value.get("size"), value.get("counts"))
    rings = polygon_rings(value)
    return around([v for ring in rings for v in ring]) if rings else None


def _mask_box(size: Any, counts: Any) -> Box | None:
    if not isinstance(size, list) or len(size) != 2 or not all(is_whole(v) and 0 < v <= MAX_SIDE_PX for v in size):
        return None
    height, width = (int(v) for v in size)
    code: dict[str, Any] = {"size": [height, width]}
    if isinstance(counts, str) and _COMPRESSED.fullmatch(counts):
        code["counts"] = counts.encode()
    elif isinstance(counts, list) and all(is_whole(n) and n >= 0 for n in counts) and sum(counts) == height * width:
        code = mask.frPyObjects(code | {"counts": [int(n) for n in counts]}, height, width)
    else:
        return None
    x, y, w, h = (float(v) for v in mask.toBbox(code))
    return (x, y, x + w, y + h) if w > 0 and h > 0 else None


def _without_outline(row: dict[str, Any]) -> dict[str, Any]:
    """`segmentation` is most of a file's bytes: it stays only where the box has to be taken from it."""
    if "segmentation" in row:
        box = corners_of_xywh(row.get("bbox"))
        if box is not None and box[:2] != box[2:]:
            del row["segmentation"]
    return row


def load_instances(path: Path, names_images: bool = True, polygons: bool = True) -> Instances:
    """Read and check an instances file; single annotations that fit nowhere become problems.

    Args:
        path: the file.
        names_images: each image must have a `file_name` (LVIS has urls instead).
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
        _check_section(source[section], section, f"{path}: {section}", skipped)
    images = {image_id: _with_size(image) for image_id, image in _by_id(source["images"])}
    rows = dict(_by_id(source["categories"]))
    # A file may mark names that training must not know, by how they are held out.
    categories = tuple(
        Category(key, row["name"], as_split(row.get("supercategory")) or "train") for key, row in rows.items()
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


def _check_section(entries: Any, section: str, where: str, skipped: set[str]) -> None:
    if not isinstance(entries, list):
        raise DataError(f"{where} is {_shown(entries)}, expected a list, as in {LAYOUT}. Export it again.")
    if section not in _FIELDS:
        return
    fields = {key: wanted for key, wanted in _FIELDS[section].items() if key not in skipped}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(
                f"{where}[{i}] is {_shown(entry)}, expected an object. Remove it, or export the file again."
            )
        if absent := [key for key in fields if key not in entry]:
            raise DataError(f"{where}[{i}] has no {absent}; expected {LAYOUT}.")
        for key, wanted in fields.items():
            value = entry[key]
            is_name = isinstance(value, str) and bool(value.strip())
            if (wanted == "a name" and not is_name) or (wanted == "a whole number" and as_whole(value) is None):
                raise DataError(f"{where}[{i}].{key} is {_shown(value)}, expected {wanted}. Correct or remove it.")
    if len(dict(_by_id(entries))) != len(entries):
        raise DataError(f"{where}: ids repeat, expected each id once. Remove the duplicates.")


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
