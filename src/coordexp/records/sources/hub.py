"""Detection data sets of the Hugging Face Hub: parquet files with embedded images.

The column `objects` has the boxes and categories of each row, as lists in a struct or as a list of structs. Names of
numbered categories are in the file's metadata. Boxes are x, y, width, height, unless the set specifies `boxes:
corners`: the Hub has both forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from coordexp.errors import DataError
from coordexp.records.categories import Category
from coordexp.records.embedded import picture_column
from coordexp.records.schema import as_flag
from coordexp.records.sources.base import (
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    as_whole,
    corners_of_xywh,
)
from coordexp.records.sources.files import annotation_files, opened_parquet, parse_json, shown

LAYOUT = "parquet files of the Hugging Face Hub with the columns image and objects"
OBJECTS = ("objects", "annotations", "detections")
BOXES = ("bbox", "bboxes", "boxes", "box")
NAMES = (
    "category", "categories", "label", "labels", "category_id", "category_ids", "class", "classes", "class_id", "name",
    "names",
)  # fmt: skip
CROWDS, AREAS = ("iscrowd", "is_crowd"), ("area", "areas")


def read(files: SplitFiles) -> Reading:
    """Read Hub parquet files; the annotation file may be a glob pattern such as `data/train-*.parquet`, or a folder."""
    paths = annotation_files(files.path, (".parquet",))
    if not paths:
        raise DataError(f"{files.path}: not found; expected {LAYOUT}.")
    layouts = {}
    for path in paths:
        with opened_parquet(path, LAYOUT) as table:
            layouts[path] = _layout(table.schema_arrow, str(path))
    names = next((names for *_, names in layouts.values() if names), [])
    categories = tuple(Category(number, name) for number, name in enumerate(names))

    def entries() -> Iterator[tuple[Path, int, dict[str, Any]]]:
        for path, (_, columns, _) in layouts.items():
            number = 0
            with opened_parquet(path, LAYOUT) as table:
                for batch in table.iter_batches(batch_size=1000, columns=columns):  # never the images
                    for row in batch.to_pylist():
                        yield path, number, row
                        number += 1

    def parse(entry: tuple[Path, int, dict[str, Any]]) -> SourceImage:
        path, number, row = entry
        return SourceImage(
            file_name=f"{path.relative_to(files.root).as_posix()}/{number}",
            key=f"row {number}",
            image_id=None,
            width=row.get("width"),
            height=row.get("height"),
            objects=tuple(_objects(row.get(layouts[path][0]), names)),
            file=str(path),
        )

    return Reading(entries(), categories, [], parse)


def _layout(schema: pa.Schema, where: str) -> tuple[str, list[str], list[str]]:
    """The column of objects, the columns to read, and the names of categories."""
    objects = next((name for name in OBJECTS if name in schema.names), None)
    if objects is None or picture_column(schema) is None:
        raise DataError(f"{where}: has the columns {shown(schema.names, 200)}; expected {LAYOUT}.")
    columns = [objects, *(name for name in ("width", "height") if name in schema.names)]
    return objects, columns, category_names(schema, objects)


def category_names(schema: pa.Schema, objects: str) -> list[str]:
    """Names of numbered categories, which the library `datasets` stores in the schema; empty without them."""
    try:
        described = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"), "its metadata", LAYOUT)
        found = described["info"]["features"][objects]
    except (DataError, KeyError, TypeError):
        return []
    pending: list[tuple[str, Any]] = [("", found)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            names = value.get("names")
            if key in NAMES and isinstance(names, list) and all(isinstance(n, str) and n.strip() for n in names):
                return names
            # The nesting of features differs between versions of the library.
            pending += [(k if k in NAMES else key, v) for k, v in value.items()]
        elif isinstance(value, list):
            pending += [(key, v) for v in value]
    return []


def _objects(value: Any, names: Sequence[str]) -> Iterator[SourceObject]:
    for i, row in enumerate(_rows(value)):
        box, crowd = _first(row, BOXES), _first(row, CROWDS)
        found = _first(row, NAMES)
        number = as_whole(found)
        is_numbered = not isinstance(found, str) and number is not None and bool(names)
        desc: Any = found
        if is_numbered and number is not None:
            desc = names[number] if 0 <= number < len(names) else None
        yield SourceObject(
            desc=desc if isinstance(desc, str) or desc is None else str(desc),
            box_xyxy=corners_of_xywh(box),
            key=f"object {i}",
            iscrowd=as_flag(crowd),
            has_size=True,
            category_id=number if is_numbered else None,
            found=f"bbox {shown(box)}, iscrowd {shown(crowd)}",
            area_px2=_first(row, AREAS),
        )


def _rows(value: Any) -> Iterator[Mapping[str, Any]]:
    """One mapping per object, from either form."""
    if isinstance(value, dict):
        lists = {key: v for key, v in value.items() if isinstance(v, list)}
        for i in range(max(map(len, lists.values()), default=0)):
            yield {key: v[i] if i < len(v) else None for key, v in lists.items()}
    elif isinstance(value, list):
        yield from (row if isinstance(row, dict) else {} for row in value)


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if key in row), None)
