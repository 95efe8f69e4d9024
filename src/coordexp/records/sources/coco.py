"""COCO instances JSON, the parts that LVIS shares with it, and Objects365.

The file is read in pieces, and its annotations are grouped by image in bounded memory, so that memory depends on the
number of images, not on that of boxes (25 million in Objects365).

File names in Objects365 v2 differ from the unpacked archives: `zhiyuan_objv2_train.json` has
`images/v1/patch8/objects365_v1_00420917.jpg`, but the archive `patch8.tar.gz` unpacks to
`patch8/objects365_v1_00420917.jpg`. So only the last two parts of the name are used, below the image folder of the set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools import mask

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.records.categories import Category, as_split
from coordexp.records.schema import as_flag
from coordexp.records.sources.base import (
    ImageNames,
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
)
from coordexp.records.sources.files import shown
from coordexp.records.sources.grouped import Grouped, rows_of
from coordexp.records.sources.json_stream import LIST, stream_json

LAYOUT = "COCO's instances layout"
SECTIONS = ("images", "annotations", "categories")
# The keys to read of images and annotations; others would only use memory.
_IMAGE_KEYS = ("coco_url", "neg_category_ids", "not_exhaustive_category_ids", "caption")
_ANNOTATION_KEYS = ("id", "category_id", "bbox", "iscrowd", "segmentation", "area")
MAX_SIDE_PX = 1 << 20
# The alphabet of compressed counts. The last character must end a number: pycocotools would read beyond the text.
_COMPRESSED = re.compile(r"[0-o]*[0-O]")


@dataclass(slots=True)
class ImageRow:
    """An image of the file; a missing size is None, and keys in `_IMAGE_KEYS` are in `more`."""

    image_id: int | str
    file_name: Any
    width: Any
    height: Any
    more: dict[str, Any] | None = None

    def get(self, key: str) -> Any:
        """The value of one of the keys in `more`."""
        return (self.more or {}).get(key)


@dataclass(slots=True)
class Instances:
    """A checked instances file: images in the order of their ids, with their annotations."""

    path: Path
    images: list[ImageRow] = field(default_factory=list)
    categories: tuple[Category, ...] = ()
    rows: dict[int | str, dict[str, Any]] = field(default_factory=dict)  # the categories as in the file
    numbers: dict[int | str, int] = field(default_factory=dict)  # id of a category -> its number
    grouped: Grouped = field(default_factory=Grouped)  # by index in `images`: [key, annotation]
    problems: list[Problem] = field(default_factory=list)

    def name_of(self, category_id: Any) -> str:
        """Name of a declared category."""
        return str(self.rows[category_id]["name"])

    def entries(self) -> Iterator[tuple[int, ImageRow, list[str]]]:
        """Every image in the order of ids, numbered from 1, with its annotations as text."""
        groups = iter(self.grouped)
        place, found = next(groups, (-1, []))
        for i, image in enumerate(self.images):
            if i == place:
                yield i + 1, image, found
                place, found = next(groups, (-1, []))
            else:
                yield i + 1, image, []

    def by_image(self) -> Iterator[tuple[ImageRow, list[tuple[str, dict[str, Any]]]]]:
        """Every image, in the order of ids, with its annotations."""
        return ((image, rows_of(texts)) for _, image, texts in self.entries())


def read(files: SplitFiles) -> Reading:
    """Read COCO; `file_name` is relative to the image folder."""
    instances = load_instances(files.path, polygons=files.polygons)
    names = ImageNames(files)
    return instances_reading(instances, lambda image: names.find(image.file_name))


def read_objects365(files: SplitFiles) -> Reading:
    """Read Objects365 v2; the image folder contains `patch0`, `patch1`, ..."""
    instances = load_instances(files.path, polygons=files.polygons)
    return instances_reading(instances, lambda image: files.image_name(patch_path(image.file_name)))


def patch_path(file_name: str) -> str:
    """ "images/v2/patch43/objects365_v2_00908726.jpg" -> "patch43/objects365_v2_00908726.jpg"."""
    parts = file_name.split("/")
    return "/".join(parts[-2:]) if len(parts) >= 2 and parts[-2].startswith("patch") else file_name


def instances_reading(
    instances: Instances,
    image_name: Callable[[ImageRow], object],
    image_metadata: Callable[[ImageRow], dict[str, Any]] | None = None,
) -> Reading:
    """The images of a loaded file in id order."""

    def parse(entry: tuple[int, ImageRow, list[str]]) -> SourceImage:
        place, image, texts = entry
        return SourceImage(
            file_name=image_name(image),
            key=f"image {image.image_id}",
            image_id=image.image_id if isinstance(image.image_id, int) else place,
            width=image.width,
            height=image.height,
            objects=tuple(_to_object(key, a, instances) for key, a in rows_of(texts)),
            file=str(instances.path),
            metadata=image_metadata(image) if image_metadata else {},
        )

    return Reading(instances.entries(), instances.categories, instances.problems, parse)


def _to_object(key: str, annotation: dict[str, Any], instances: Instances) -> SourceObject:
    box, iscrowd = annotated_box(annotation), as_flag(annotation.get("iscrowd"))
    category_id = as_id(annotation.get("category_id"))
    is_known = category_id in instances.rows
    unclear = "category_id" if not is_known else "bbox" if box is None else "iscrowd" if iscrowd is None else ""
    return SourceObject(
        desc=instances.name_of(category_id) if is_known else None,
        box_xyxy=box,
        key=key,
        iscrowd=iscrowd,
        has_size=True,
        rings=polygon_rings(annotation.get("segmentation")),
        category_id=instances.numbers[category_id] if is_known and category_id is not None else None,
        problem="" if is_known else "unknown_category",
        found=f"{unclear} {_shown(annotation.get(unclear))}" if unclear else "",
        area_px2=annotation.get("area"),
    )


def annotated_box(annotation: dict[str, Any]) -> Box | None:
    """The box of an annotation; if `bbox` is missing, invalid or a point, the tight box of its `segmentation`."""
    box = corners_of_xywh(annotation.get("bbox"))
    if box is None or box[:2] == box[2:]:
        return tight_box(annotation.get("segmentation")) or box
    return box


def polygon_rings(value: Any) -> tuple[tuple[float, ...], ...]:
    """The rings of COCO's polygon form, or of a single ring without its list; empty for masks and anything else."""
    if not isinstance(value, list):
        return ()
    rings = [value] if value and not isinstance(value[0], list) else value
    return tuple(found for ring in rings if (found := _ring(ring)))


def _ring(ring: Any) -> tuple[float, ...]:
    """A ring as x1, y1, x2, y2, ..., also from pairs; empty if it is invalid."""
    if not isinstance(ring, list):
        return ()
    if ring and all(isinstance(pair, list) and len(pair) == 2 for pair in ring):
        ring = [v for pair in ring for v in pair]
    if len(ring) < 6 or len(ring) % 2:
        return ()
    if all(map(is_finite, ring)):
        return tuple(float(v) for v in ring)
    values = [as_number(v) for v in ring]
    return () if None in values else tuple(v for v in values if v is not None)


def tight_box(value: Any) -> Box | None:
    """The tight box of a `segmentation`, in pixels; None if it is empty or neither polygons nor a run-length mask."""
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
    """Drop `segmentation`, which is most of a file's bytes, unless it is needed to get the box."""
    if "segmentation" in row:
        box = corners_of_xywh(row.get("bbox"))
        if box is not None and box[:2] != box[2:]:
            del row["segmentation"]
    return row


def load_instances(
    path: Path, names_images: bool = True, polygons: bool = True, grouped: Grouped | None = None
) -> Instances:
    """Read and check an instances file; annotations without a known image become problems.

    Args:
        path: the file.
        names_images: whether each image must have a `file_name` (LVIS has URLs instead).
        polygons: whether to read `segmentation`.
        grouped: storage of the annotations by image.

    Raises:
        DataError: an entry is missing or has no valid id or name; the message has file and entry.
    """
    loading = _Loading(Instances(path, grouped=grouped or Grouped()), names_images)
    on_object = None if polygons else _without_outline
    for key, value in stream_json(path, "a COCO instances file", on_object):
        if key in SECTIONS:
            loading.take(key, value)
    if missing := set(SECTIONS) - loading.counts.keys():
        raise DataError(f"{path}: keys {sorted(missing)} are missing; expected {LAYOUT}.")
    if loading.waits:  # annotations precede the images in the file: read them in a second pass
        loading.settle_images()
        rows = (value for key, value in stream_json(path, LAYOUT, on_object) if key == "annotations")
        for number, value in enumerate(value for value in rows if value is not LIST):
            loading.place(number, value)
    return loading.finished()


@dataclass(slots=True)
class _Loading:
    """The state of reading an instances file."""

    instances: Instances
    names_images: bool
    counts: dict[str, int] = field(default_factory=dict)  # number of entries of each section read so far
    images: dict[int | str, ImageRow] = field(default_factory=dict)
    places: dict[int | str, int] = field(default_factory=dict)  # id of an image -> its index in the order of ids
    waits: bool = False

    def take(self, key: str, value: Any) -> None:
        """Process the start of a section, or one entry of it."""
        where = f"{self.instances.path}: {key}"
        if value is LIST:
            if key in self.counts:
                raise DataError(f"{where} occurs twice; expected {LAYOUT}.")
            self.counts[key] = 0
            if key == "annotations":
                self.waits = "images" not in self.counts
                self.settle_images()
            return
        if key not in self.counts:
            raise DataError(f"{where} is {_shown(value)}, expected a list, as in {LAYOUT}. Export it again.")
        number = self.counts[key]
        self.counts[key] += 1
        if key != "annotations":
            needs_name = key == "categories" or self.names_images
            _check_entry(value, f"{where}[{number}]", "file_name" if key == "images" else "name", needs_name)
            self.add(key, value, where)
        elif not self.waits:
            self.place(number, value)

    def add(self, section: str, entry: dict[str, Any], where: str) -> None:
        """Add a checked image or category."""
        key = as_id(entry["id"])
        known: dict[int | str, Any] = self.images if section == "images" else self.instances.rows
        if key is None or key in known:
            raise DataError(f"{where}: ids repeat, expected each id once. Remove the duplicates.")
        if section == "images":
            size = (_side(entry.get("width")), _side(entry.get("height")))
            more = {name: entry[name] for name in _IMAGE_KEYS if name in entry}
            self.images[key] = ImageRow(key, entry.get("file_name"), *size, more or None)
        else:
            self.instances.rows[key] = entry | {"name": str(entry["name"])}

    def settle_images(self) -> None:
        """Sort the images by id."""
        keys = sorted(self.images, key=lambda key: (isinstance(key, str), key))
        self.instances.images = [self.images[key] for key in keys]
        self.places = {key: place for place, key in enumerate(keys)}

    def place(self, index: int, annotation: Any) -> None:
        """Add one annotation to its image, or to the problems."""
        fields = annotation if isinstance(annotation, dict) else {}
        found = fields.get("id")
        named = str(found)[:60] if isinstance(found, int | str) else shown(found)
        key = f"annotations[{index}]" if found is None else f"annotation {named}"
        image_id = as_id(fields.get("image_id"))
        if image_id is None or image_id not in self.places:
            detail = f"image_id {_shown(fields.get('image_id'))}"
            self.instances.problems.append(Problem("unknown_image", str(self.instances.path), key, detail))
            return
        row = {name: fields[name] for name in _ANNOTATION_KEYS if name in fields}
        self.instances.grouped.add(self.places[image_id], [key, row])

    def finished(self) -> Instances:
        """The complete file with numbered categories."""
        instances = self.instances
        if not instances.images:
            self.settle_images()
        instances.numbers = {key: key for key in instances.rows if isinstance(key, int)}
        if len(instances.numbers) < len(instances.rows):  # some ids are text: number the categories in order
            instances.numbers = {key: number for number, key in enumerate(instances.rows, 1)}
        parents = {row["supercategory"] for row in instances.rows.values() if isinstance(row.get("supercategory"), str)}
        rows = instances.rows.items()
        instances.categories = tuple(_category(instances.numbers[key], row, parents) for key, row in rows)
        return instances


def _category(number: int, row: dict[str, Any], parents: set[Any]) -> Category:
    parent = row.get("supercategory")
    is_root = parent in ("none", "", None) and row["name"] in parents
    # A file may mark held-out categories by the name of their split in `supercategory`.
    return Category(number, row["name"], as_split(parent) or "train", is_root=is_root)


def as_id(value: Any) -> int | str | None:
    """An id as a key: an integer, possibly written as text, or other text; None for anything else."""
    number = as_whole(value)
    if number is not None:
        return number
    return value.strip() if isinstance(value, str) and value.strip() else None


def _check_entry(entry: Any, where: str, name: str, needs_name: bool) -> None:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {_shown(entry)}, expected an object. Remove it, or export the file again.")
    if absent := [key for key in ("id", *([name] if needs_name else [])) if key not in entry]:
        raise DataError(f"{where} has no {absent}; expected {LAYOUT}.")
    if as_id(entry["id"]) is None:
        raise DataError(f"{where}.id is {_shown(entry['id'])}, expected an integer or text. Correct or remove it.")
    value = entry.get(name)
    is_name = (isinstance(value, str) and bool(value.strip())) or (name == "name" and is_whole(value))
    if needs_name and not is_name:
        raise DataError(f"{where}.{name} is {_shown(value)}, expected a name. Correct or remove it.")


def _side(value: Any) -> Any:
    """A width or height, converted to a number if it is written as text."""
    number = as_number(value) if isinstance(value, str) else None
    return value if number is None else number


def _shown(value: Any) -> str:
    """Quote a JSON value for messages, shortened."""
    if isinstance(value, list | dict) and len(value) > 40:
        return f"a {'list' if isinstance(value, list) else 'object'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
