"""Pascal VOC: one XML file per image. The annotation file is a list of image names, a folder of XML files, or one file.

VOC counts pixels from 1 and stores the first and last pixel of an object, so a box covers [xmin - 1, xmax]. For files
of tools that count from 0, set `boxes: from_0`. VOC's own evaluation ignores objects marked `difficult`: they become
ignore regions, as crowd regions do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
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
)
from coordexp.records.sources.files import annotation_files, is_readable, read_text, read_xml, shown

LAYOUT = "Pascal VOC's XML, with an <annotation>"
LIST = "a list of image names, one per line, or a folder of XML files"
_FOLDERS = ("Annotations", "annotations", "xml", "labels")


def read(files: SplitFiles) -> Reading:
    """Read VOC; the annotation file is a list such as `ImageSets/Main/train.txt`, or the folder `Annotations`."""
    listed, problems = _listed(files), list[Problem]()
    if files.path.suffix.lower() == ".xml":
        read_xml(files.path, LAYOUT)
    names, seen = ImageNames(files), set[str]()

    def entries() -> Iterator[tuple[str, Path]]:
        for stem, path in listed:
            if stem in seen:
                problems.append(Problem("duplicate_id", str(files.path), stem))
            else:
                seen.add(stem)
                yield stem, path

    def parse(entry: tuple[str, Path]) -> SourceImage | Problem:
        stem, path = entry
        try:
            return _image(names, path, stem)
        except DataError as error:
            return Problem("annotation_unreadable", str(path), stem, str(error))

    return Reading(entries(), (), problems, parse)


def _listed(files: SplitFiles) -> list[tuple[str, Path]]:
    """The name of each image without its suffix, and its XML file."""
    if files.path.is_dir():
        paths = annotation_files(files.path, (".xml",))
        if not paths:
            raise DataError(f"{files.path}: has no XML file; expected {LIST}.")
        return [(path.relative_to(files.path).with_suffix("").as_posix(), path) for path in paths]
    if files.path.suffix.lower() == ".xml":
        return [(files.path.stem, files.path)]
    lines = [line.strip() for line in read_text(files.path, LIST).splitlines() if line.strip()]
    folders = _xml_folders(files)
    if not folders:
        raise DataError(
            f"{files.root / _FOLDERS[0]}: no such folder, and no XML next to the images; expected Pascal VOC's XML."
        )
    found = [_stem(line, folders) for line in lines]
    return [(stem, _xml(stem, folders)) for stem in found]


def read_from(files: SplitFiles) -> list[Path]:
    """All files with annotations of the split."""
    listed = _listed(files)
    return [*([] if files.path.is_dir() else [files.path]), *(path for _, path in listed)]


def _xml_folders(files: SplitFiles) -> list[Path]:
    """The possible folders of XML files: a separate folder, or next to the images."""
    image_folder = files.root / files.images
    places = [place / name for place in (files.root, image_folder, image_folder.parent) for name in _FOLDERS]
    found = [p for p in dict.fromkeys([*places, image_folder, files.path.parent]) if p.is_dir()]
    return [p for p in found if p.name in _FOLDERS or any(p.glob("*.xml"))]


def _stem(line: str, folders: Sequence[Path]) -> str:
    """The image name in a line: the whole line, without a suffix, or before the `1` or `-1` of a class list."""
    if is_readable(_xml(line, folders)):
        return line
    name, *flag = line.rsplit(maxsplit=1)
    plain = line.replace("\\", "/")
    candidates = [name] if flag in (["1"], ["0"], ["-1"]) else []
    candidates += [plain.rsplit(".", 1)[0], plain.rsplit("/", 1)[-1], plain.rsplit("/", 1)[-1].rsplit(".", 1)[0]]
    return next((c for c in candidates if c and is_readable(_xml(c, folders))), candidates[0] if flag else line)


def _xml(stem: str, folders: Sequence[Path]) -> Path:
    paths = [folder / f"{stem}.xml" for folder in folders]
    return next((path for path in paths if is_readable(path)), paths[0])


def _image(names: ImageNames, path: Path, stem: str) -> SourceImage:
    root = read_xml(path, LAYOUT)
    if root.tag != "annotation":
        raise DataError(f"{path}: its root is <{root.tag[:40]}>; expected {LAYOUT}.")
    width, height = as_number(root.findtext("size/width")), as_number(root.findtext("size/height"))
    has_size = bool(width and height)  # some tools write 0 for "unknown"
    return SourceImage(
        file_name=_image_name(names, root.findtext("filename"), stem),
        key=stem,
        image_id=None,
        width=width if has_size else None,
        height=height if has_size else None,
        objects=tuple(_object(node, i) for i, node in enumerate(root.findall("object"))),
        file=str(path),
    )


def _image_name(names: ImageNames, filename: str | None, stem: str) -> object:
    """The image with the stem of the XML file, as tools pair them; `filename` can be stale in renamed files."""
    paired = names.of_stem(str(names.files.image_name(stem)))
    named = names.find((filename or "").strip() or f"{stem}.jpg")
    if paired and Path(paired).name != Path(str(named)).name:
        return paired
    return named


def _object(node: ElementTree.Element, index: int) -> SourceObject:
    is_difficult = as_flag(node.findtext("difficult")) is True  # some tools write "Unspecified"
    box = _box(node)
    return SourceObject(
        desc=node.findtext("name"),
        box_xyxy=box,
        key=f"object[{index}]",
        iscrowd=is_difficult,
        truncated=as_flag(node.findtext("truncated")) is True,
        counts_from=1,
        found="" if box else shown(" ".join(f"{n.tag} {n.text}" for n in node.findall("bndbox/*")), 80),
        metadata={"difficult": 1} if is_difficult else {},
    )


def _box(node: ElementTree.Element) -> Box | None:
    """Corners counted from 0; if the box is missing, the tight box of the polygon that some tools write."""
    found = [as_number(node.findtext(f"bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax")]
    values = [v for v in found if v is not None]
    if len(values) == 4:
        x1, y1, x2, y2 = values
        return x1 - 1, y1 - 1, x2, y2
    if node.find("bndbox") is not None:
        return None
    points = [as_number(part.text) for part in node.findall("polygon/*")]
    known: list[Any] = [v for v in points if v is not None]
    if len(known) != len(points) or len(known) < 6 or len(known) % 2:
        return None
    x1, y1, x2, y2 = around(known)
    return x1 - 1, y1 - 1, x2, y2
