"""Pascal VOC: one XML file an image, and a list of image names for each split.

VOC counts pixels from 1 and names the first and last pixel of an object, so a box covers [xmin - 1, xmax]. Objects
marked `difficult` are not counted in VOC's own evaluation: they become ignore regions, as crowds do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.records.schema import as_flag
from coordexp.records.sources.base import (
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    is_finite,
    read_text,
)

# ElementTree expands entities: a few lines that define them could fill the memory, and no VOC file has any.
_ENTITY = re.compile(rb"<!(?:DOCTYPE|ENTITY)", re.IGNORECASE)


def read(files: SplitFiles) -> Reading:
    """VOC; the annotation file is the list, such as `ImageSets/Main/train.txt`, beside the folder `Annotations`."""
    if not files.path.is_file():
        raise DataError(f"{files.path}: not found; expected a list of image names, one a line.")
    folder = files.root / "Annotations"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected the XML files of Pascal VOC.")
    lines = read_text(files.path, "a list of image names, one a line").splitlines()
    stems = [_stem(line.strip(), folder) for line in lines if line.strip()]
    problems: list[Problem] = []

    def images() -> Iterator[SourceImage]:
        seen: set[str] = set()
        for stem in stems:
            if stem in seen:
                problems.append(Problem("duplicate_id", str(files.path), stem))
                continue
            seen.add(stem)
            image = _read_image(files, folder / f"{stem}.xml", stem, problems)
            if image is not None:
                yield image

    return Reading(images(), (), problems)


def _stem(line: str, folder: Path) -> str:
    """The image name of a line: all of it, or what stands before the `1` or `-1` of a class's list."""
    name, *flag = line.rsplit(maxsplit=1)
    is_flagged = flag in (["1"], ["0"], ["-1"]) and not (folder / f"{line}.xml").is_file()
    return name if is_flagged else line


def _read_image(files: SplitFiles, path: Path, stem: str, problems: list[Problem]) -> SourceImage | None:
    try:
        content = path.read_bytes()
        if _ENTITY.search(content):
            raise ElementTree.ParseError("it declares a document type or an entity")
        root = ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError, ValueError) as error:
        problems.append(Problem("annotation_unreadable", str(path), stem, str(error)))
        return None
    width, height = _number(root.findtext("size/width")), _number(root.findtext("size/height"))
    has_size = bool(width and height)  # some tools write 0 for "unknown"
    return SourceImage(
        file_name=files.image_name(root.findtext("filename") or f"{stem}.jpg"),
        key=stem,
        image_id=None,
        width=width if has_size else None,
        height=height if has_size else None,
        objects=tuple(_object(node, i) for i, node in enumerate(root.findall("object"))),
        file=str(path),
    )


def _object(node: ElementTree.Element, index: int) -> SourceObject:
    is_difficult = as_flag(node.findtext("difficult")) is True  # some tools write "Unspecified"
    return SourceObject(
        desc=node.findtext("name"),
        box_xyxy=_box(node.find("bndbox")),
        key=f"object[{index}]",
        iscrowd=is_difficult,
        truncated=as_flag(node.findtext("truncated")) is True,
        metadata={"difficult": 1} if is_difficult else {},
    )


def _box(node: ElementTree.Element | None) -> Box | None:
    if node is None:
        return None
    values: list[Any] = [_number(node.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax")]
    if not all(v is not None and is_finite(v) for v in values):
        return None
    x1, y1, x2, y2 = values
    return x1 - 1, y1 - 1, x2, y2


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
