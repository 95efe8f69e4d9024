"""COCO instances JSON to records: pixel xyxy boxes, one record per image, every dropped box counted with a reason."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.geometry.boxes import as_boxes, reading_order
from coordexp.records.categories import Category
from coordexp.records.schema import ObjectRecord, Record

MIN_SIDE_PX = 1.0
SECTIONS = ("images", "annotations", "categories")
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


def read_coco(annotations: Path, image_prefix: str) -> Conversion:
    """Convert one instances file; `image_prefix` is put before each file name (path relative to the image root).

    Boxes are clipped to the image. A box is dropped, and counted, if it is not finite, thinner than 1 px after
    clipping, or of an unknown category or image. Crowd boxes are kept with `metadata.iscrowd` (ignored in training,
    ignore regions in evaluation). Objects are in reading order.

    Raises:
        DataError: naming the file, and the entry that is missing or has no valid id, name or size.
    """
    source = _load(annotations)
    categories = tuple(
        Category(int(c["id"]), c["name"], "held_out" if c.get("supercategory") == "held_out" else "train")
        for c in source["categories"]
    )
    names = {c.id: c.name for c in categories}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    drops: Counter[str] = Counter()
    images = {int(image["id"]): image for image in source["images"]}
    for annotation in source["annotations"]:
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if not _is_whole(image_id) or image_id not in images:
            drops["unknown_image"] += 1
        elif not _is_whole(category_id) or category_id not in names:
            drops["unknown_category"] += 1
        else:
            by_image[image_id].append(annotation)
    records = []
    for image_id in sorted(images):
        image = images[image_id]
        objects = [_to_object(a, image, names, drops) for a in by_image[image_id]]
        kept = [o for o in objects if o is not None]
        order = reading_order(as_boxes([o.bbox_xyxy_px for o in kept]))
        records.append(
            Record(
                image=f"{image_prefix}{image['file_name']}",
                width=int(image["width"]),
                height=int(image["height"]),
                objects=tuple(kept[i] for i in order),
                metadata={"image_id": image_id},
            )
        )
    return Conversion(tuple(records), categories, dict(drops))


def _load(annotations: Path) -> dict[str, list[dict[str, Any]]]:
    """The file's three sections, each a list of objects; images and categories have valid fields and distinct ids."""
    if not annotations.is_file():
        raise DataError(f"{annotations}: not found; expected a COCO instances JSON file.")
    try:
        source = json.loads(annotations.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{annotations}:{error.lineno}: not valid JSON ({error.msg}); expected a COCO instances file. Export again."
        ) from error
    except ValueError as error:  # not UTF-8, or a number beyond what Python reads
        raise DataError(
            f"{annotations}: not JSON in UTF-8 ({error}); expected a COCO instances file. Export again."
        ) from error
    missing = set(SECTIONS) - set(source if isinstance(source, dict) else ())
    if missing:
        raise DataError(f"{annotations}: keys {sorted(missing)} are missing; expected COCO's instances layout.")
    for section in SECTIONS:
        _check_section(source[section], section, f"{annotations}: {section}")
    return source


def _check_section(entries: Any, section: str, where: str) -> None:
    if not isinstance(entries, list):
        raise DataError(
            f"{where} is {_shown(entries)}, expected a list, as in COCO's instances layout. Export it again."
        )
    fields = _FIELDS.get(section, {})
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(
                f"{where}[{i}] is {_shown(entry)}, expected an object. Remove it, or export the file again."
            )
        if absent := [key for key in fields if key not in entry]:
            raise DataError(f"{where}[{i}] has no {absent}; expected COCO's instances layout.")
        for key, is_whole in fields.items():
            value = entry[key]
            if is_whole and not (_is_whole(value) and (key == "id" or value > 0)):
                wanted = "a whole number" if key == "id" else "a size in whole pixels"
                raise DataError(f"{where}[{i}].{key} is {_shown(value)}, expected {wanted}. Correct or remove it.")
            if not is_whole and not (isinstance(value, str) and value.strip()):
                raise DataError(f"{where}[{i}].{key} is {_shown(value)}, expected a name. Correct or remove it.")
    if "id" in fields and len({entry["id"] for entry in entries}) != len(entries):
        raise DataError(f"{where}: ids repeat, expected each id once. Remove the duplicates.")


def _shown(value: Any) -> str:
    """A JSON value as a message quotes it: as JSON writes it, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _to_object(
    annotation: dict[str, Any], image: dict[str, Any], names: dict[int, str], drops: Counter[str]
) -> ObjectRecord | None:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        drops["bbox_malformed"] += 1
        return None
    x, y, w, h = (float(v) for v in box)
    x1, x2 = (min(max(v, 0.0), float(image["width"])) for v in (x, x + w))
    y1, y2 = (min(max(v, 0.0), float(image["height"])) for v in (y, y + h))
    if x2 - x1 < MIN_SIDE_PX or y2 - y1 < MIN_SIDE_PX:
        drops["bbox_too_thin"] += 1
        return None
    metadata = {"iscrowd": 1} if annotation.get("iscrowd") else {}
    return ObjectRecord(names[annotation["category_id"]], (x1, y1, x2, y2), None, metadata)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    """A whole number, also one that a table program wrote as 3.0."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
