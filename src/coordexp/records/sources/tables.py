"""CSV: boxes in a table, and Open Images, which has several tables.

Without a header, the columns are those of RetinaNet: path, x1, y1, x2, y2, class; a row with only a path is an image
without objects. With a header, columns are found by their usual names (`COLUMNS`), in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.records.categories import Category
from coordexp.records.schema import as_flag
from coordexp.records.sources.base import (
    ImageNames,
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    as_number,
    corners,
    corners_of_xywh,
)
from coordexp.records.sources.files import is_readable, read_csv, shown
from coordexp.records.sources.grouped import Grouped, rows_of

LAYOUT = "a table of boxes: image, x1, y1, x2, y2, class, or with a header (docs/data.md lists the column names)"
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": (
        "image", "filename", "file_name", "image_path", "path", "image_name", "img", "img_path", "file", "image_id",
        "imageid",
    ),
    "label": ("class", "label", "class_name", "label_name", "category", "category_name", "name", "labelname"),
    "x1": ("xmin", "x1", "x_min", "left", "bbox_x1", "xtl"),
    "y1": ("ymin", "y1", "y_min", "top", "bbox_y1", "ytl"),
    "x2": ("xmax", "x2", "x_max", "right", "bbox_x2", "xbr"),
    "y2": ("ymax", "y2", "y_max", "bottom", "bbox_y2", "ybr"),
    "x": ("x", "bbox_x"),
    "y": ("y", "bbox_y"),
    "w": ("w", "bbox_w", "bbox_width", "box_width"),
    "h": ("h", "bbox_h", "bbox_height", "box_height"),
    "bbox": ("bbox", "box"),
    "image_width": ("width", "image_width", "img_width"),
    "image_height": ("height", "image_height", "img_height"),
    "split": ("split", "subset", "set"),
    "iscrowd": ("iscrowd", "isgroupof", "difficult"),
    "truncated": ("truncated", "istruncated"),
}  # fmt: skip
RETINANET = ("image", "x1", "y1", "x2", "y2", "label")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
OPEN_IMAGES = "Open Images' *-annotations-bbox.csv, with class-descriptions-boxable.csv in its folder or the parent"
_DESCRIPTIONS = "*class-descriptions*.csv"
_IMAGE_LABELS = "*imagelabels*.csv"
Columns = Mapping[str, int]


def read(files: SplitFiles) -> Reading:
    """Read CSV; paths in the table are relative to the image folder."""
    columns, rows = opened_table(files.path)
    problems: list[Problem] = []
    numbers: dict[str, int] = {}
    grouped = Grouped()
    for line, row in enumerate(rows, 1):
        cells = {name: row[i] for name, i in columns.items() if i < len(row)}
        if _SPLITS.get(cells.get("split", "").lower(), files.split) != files.split:
            continue
        if not cells.get("image"):
            problems.append(Problem("unknown_image", str(files.path), f"row {line}", shown(",".join(row), 80)))
            continue
        grouped.add(numbers.setdefault(cells["image"], len(numbers)), [line, cells])
    names, finder = list(numbers), ImageNames(files)

    def parse(entry: tuple[int, list[str]]) -> SourceImage:
        number, found = entry[0], rows_of(entry[1])
        first = found[0][1]
        return SourceImage(
            file_name=finder.find(names[number]),
            key=names[number],
            image_id=None,
            width=as_number(first.get("image_width")),
            height=as_number(first.get("image_height")),
            objects=tuple(_object(line, cells) for line, cells in found if _is_object(cells)),
            file=str(files.path),
        )

    return Reading(grouped, (), problems, parse)


def opened_table(path: Path) -> tuple[Columns, Iterator[list[str]]]:
    """The column indices, and the rows after the header; raises DataError if it is not a table of boxes."""
    rows = read_csv(path, LAYOUT)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path}: is empty; expected {LAYOUT}.")
    names = [cell.lower().replace(" ", "_") for cell in first]
    # If several columns match, the first of the usual names wins.
    columns = {key: names.index(known) for key, usual in COLUMNS.items() if (known := _first_of(usual, names))}
    if "w" not in columns and "x" in columns and "image_width" in columns and "x1" not in columns:
        # x, y, width, height: box sizes, unless the table has other columns for them.
        columns["w"], columns["h"] = columns.pop("image_width"), columns.pop("image_height", -1)
    boxes = {"x1", "y1", "x2", "y2"} <= columns.keys() or {"x", "y", "w", "h"} <= columns.keys() or "bbox" in columns
    if "image" in columns and boxes:
        return columns, rows
    if len(first) in (5, 6) and all(not cell or as_number(cell) is not None for cell in first[1:5]):
        return {name: i for i, name in enumerate(RETINANET)}, chain([first], rows)
    raise DataError(f"{path}: its first line is {shown(','.join(first), 80)}; expected {LAYOUT}.")


def _first_of(usual: tuple[str, ...], names: list[str]) -> str | None:
    return next((name for name in usual if name in names), None)


def _is_object(cells: Mapping[str, str]) -> bool:
    """Whether a row has an object; a row with only a path means an image without objects."""
    return any(cells.get(key) for key in ("x1", "y1", "x2", "y2", "x", "y", "w", "h", "bbox", "label"))


def _object(line: int, cells: Mapping[str, str]) -> SourceObject:
    box = _box(cells)
    flag = as_flag(cells["iscrowd"] or "0") if "iscrowd" in cells else False
    return SourceObject(
        desc=cells.get("label", "object"),
        box_xyxy=box,
        key=f"row {line}",
        iscrowd=flag,
        has_size="x1" not in cells,
        truncated=as_flag(cells.get("truncated")) is True,
        found="" if box and flag is not None else shown(",".join(cells.values()), 80),
    )


def _box(cells: Mapping[str, str]) -> Box | None:
    if "x1" in cells:
        return corners([cells.get(key) for key in ("x1", "y1", "x2", "y2")])
    if "x" in cells:
        return corners_of_xywh([cells.get(key) for key in ("x", "y", "w", "h")])
    return corners_of_xywh(cells.get("bbox", "").strip("[]() ").replace(",", " ").split())


def read_open_images(files: SplitFiles) -> Reading:
    """Read Open Images; the image folder contains `<ImageID>.jpg`. Groups are crowd regions; only verified names count
    as absent."""
    columns, rows = opened_table(files.path)
    described = _beside(files.path, _DESCRIPTIONS)
    if described is None:
        raise DataError(f"{files.path}: no {_DESCRIPTIONS} in its folder or the parent; expected {OPEN_IMAGES}.")
    names = {row[0]: row[1] for row in read_csv(described, OPEN_IMAGES) if len(row) >= 2 and row[0] != "LabelName"}
    numbers: dict[str, int] = {}
    grouped = Grouped()
    problems: list[Problem] = []
    if "image" not in columns or "label" not in columns:
        raise DataError(f"{files.path}: has no ImageID and LabelName; expected {OPEN_IMAGES}.")
    for line, row in enumerate(rows, 1):
        cells = {name: row[i] for name, i in columns.items() if i < len(row)}
        if cells.get("label") not in names:
            problems.append(Problem("unknown_category", str(files.path), f"row {line}", shown(cells.get("label"))))
            continue
        cells["label"] = names[cells["label"]]
        grouped.add(numbers.setdefault(cells["image"], len(numbers)), [line, cells])
    absent = _absent(files.path, names, numbers)
    ids, finder = list(numbers), ImageNames(files)
    categories = tuple(Category(number, name) for number, name in enumerate(dict.fromkeys(names.values()), 1))

    def parse(entry: tuple[int, list[str]]) -> SourceImage:
        image_id = ids[entry[0]]
        name = str(files.image_name(image_id))
        return SourceImage(
            file_name=finder.of_stem(name) or f"{name}.jpg",
            key=image_id,
            image_id=None,
            width=None,
            height=None,
            objects=tuple(_unit_object(line, cells) for line, cells in rows_of(entry[1])),
            file=str(files.path),
            metadata={"absent": absent.get(image_id, [])},
        )

    return Reading(grouped, categories, problems, parse)


def open_images_read_from(files: SplitFiles) -> list[Path]:
    """All tables with annotations of the split."""
    described = _beside(files.path, _DESCRIPTIONS)
    return [files.path, *([described] if described else []), *_image_labels(files.path)]


def _unit_object(line: int, cells: dict[str, str]) -> SourceObject:
    flags = {key: "0" if cells.get(key) == "-1" else cells.get(key, "0") for key in ("iscrowd", "truncated")}
    return replace(_object(line, cells | flags), side_units=1.0)  # -1 in the file: not annotated


def _beside(path: Path, pattern: str) -> Path | None:
    found = (p for folder in (path.parent, path.parent.parent) for p in sorted(folder.glob(pattern)))
    return next((p for p in found if is_readable(p) and p != path), None)


def _absent(path: Path, names: Mapping[str, str], images: Mapping[str, int]) -> dict[str, list[str]]:
    """Image -> names verified as absent, if the table of image labels is next to that of the boxes."""
    found: dict[str, set[str]] = {}
    for table in _image_labels(path):
        rows = read_csv(table, "Open Images' labels of images")
        header = {name: i for i, name in enumerate(next(rows, []))}
        if not {"ImageID", "LabelName", "Confidence"} <= header.keys():
            continue
        for row in rows:
            cells = [
                row[i] if i < len(row) else "" for i in (header["ImageID"], header["LabelName"], header["Confidence"])
            ]
            if cells[0] in images and cells[1] in names and as_number(cells[2]) == 0:
                found.setdefault(cells[0], set()).add(names[cells[1]])
    return {image: sorted(absent) for image, absent in found.items()}


def _image_labels(path: Path) -> list[Path]:
    split = path.name.split("-", 1)[0]
    return [p for p in sorted(path.parent.glob(f"{split}{_IMAGE_LABELS}")) if is_readable(p)]
