"""Write records as data sets for other programs: COCO instances JSON or a YOLO folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.errors import DataError
from coordexp.infra.files import replacing, write_text
from coordexp.records.categories import Category
from coordexp.records.images import WHOLE_PICTURE, split_view
from coordexp.records.schema import ObjectRecord, Record
from coordexp.records.sources.files import read_yaml

YOLO_FILE = "data.yaml"


def write_coco(path: Path, records: Sequence[Record], categories: Iterable[Category]) -> None:
    """Write COCO instances JSON; image ids are those of the records if they are unique, otherwise 1, 2, ...

    Raises:
        DataError: a record shows only a part of an image, which COCO cannot express.
    """
    numbers = {c.name: c.id for c in categories}
    ids = [r.metadata.get("image_id") for r in records]
    has_ids = len(set(ids)) == len(ids) and all(isinstance(i, int) for i in ids)
    images: list[dict[str, Any]] = []
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.write('{"info": {"description": "converted by coordexp"}, "licenses": [],\n"annotations": [')
        for place, record in enumerate(records, 1):
            image_id = ids[place - 1] if has_ids else place
            name = _whole(record)
            images.append({"id": image_id, "file_name": name, "width": record.width, "height": record.height})
            for obj in record.objects:
                count += 1
                row = {"id": count, "image_id": image_id, "category_id": numbers[obj.desc]} | _annotation(obj)
                out.write(",\n" if count > 1 else "\n")
                out.write(json.dumps(row))
        named = [{"id": number, "name": name, "supercategory": "none"} for name, number in numbers.items()]
        out.write(f'],\n"images": {json.dumps(images, ensure_ascii=False)},\n')
        out.write(f'"categories": {json.dumps(named, ensure_ascii=False)}}}\n')


def _annotation(obj: ObjectRecord) -> dict[str, Any]:
    x1, y1, x2, y2 = obj.bbox_xyxy_px
    box_area_px2 = (x2 - x1) * (y2 - y1)
    segmentation = obj.metadata.get("segmentation", [list(obj.poly_px)] if obj.poly_px else [])
    return {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": box_area_px2 if obj.area_px2 is None else obj.area_px2,
        "iscrowd": int(bool(obj.metadata.get("iscrowd"))),
        "segmentation": segmentation,
    }


def write_yolo(
    folder: Path, records: Sequence[Record], categories: Iterable[Category], images: Path, split: str
) -> int:
    """Write a YOLO folder: `labels/<split>`, `images/<split>` with a link per image, and `data.yaml`.

    Another split with the same names can be added to the folder later. Returns the number of omitted ignore regions,
    which YOLO cannot express.

    Raises:
        DataError: the folder has other names or other images of this split; a record shows only a part of an image.
    """
    names = [c.name for c in sorted(categories, key=lambda c: c.id)]
    numbers = {name: number for number, name in enumerate(names)}
    described = _described(folder, names)
    left_out = 0
    for record in records:
        name = _whole(record)
        _link(folder / "images" / split / name, images / name)
        label = folder / "labels" / split / PurePosixPath(name).with_suffix(".txt")
        kept = [o for o in record.objects if not o.metadata.get("iscrowd")]
        left_out += len(record.objects) - len(kept)
        write_text(label, "".join(_line(numbers[o.desc], o.bbox_xyxy_px, record) for o in kept))
    described |= {split: f"images/{split}"}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in described.items()]
    write_text(folder / YOLO_FILE, "".join(lines))
    return left_out


def _link(link: Path, picture: Path) -> None:
    if not picture.is_file():
        raise DataError(f"{picture}: no such file; expected the image of the record (an image in a shard has no file).")
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() and not link.exists():
        link.symlink_to(picture.resolve())
    elif link.resolve() != picture.resolve():
        raise DataError(f"{link}: exists and is not {picture}; expected a new folder.")


def _described(folder: Path, names: list[str]) -> dict[str, Any]:
    path = folder / YOLO_FILE
    if not path.exists():
        return {"train": "images/train", "val": "images/val", "names": names}
    described = read_yaml(path, "the data.yaml that another split wrote")
    if described.get("names") != names:
        raise DataError(f"{path}: its names differ from the {len(names)} names of this split; expected a new folder.")
    return described


def _line(number: int, box: tuple[float, float, float, float], record: Record) -> str:
    x1, y1, x2, y2 = box
    width, height = record.width, record.height
    values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
    return f"{number} {' '.join(f'{v:.8f}' for v in values)}\n"


def _whole(record: Record) -> str:
    """The file name of a record's image; raises DataError for a view of it."""
    name, view = split_view(record.image)
    if view is not WHOLE_PICTURE:
        raise DataError(f"{record.image}: only a part of an image; export records without flip, crop and scale_jitter.")
    return name
