"""Visual Genome: `objects.json` (names) or `region_descriptions.json` (phrases), next to `image_data.json`.

Boxes are x, y, w, h in pixels. Images are in `VG_100K` and `VG_100K_2`; the image's URL specifies the folder. The
annotations are not exhaustive for any category, so no name is known to be absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.records.sources.base import (
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    as_whole,
    corners_of_xywh,
)
from coordexp.records.sources.files import read_json

IMAGE_DATA = "image_data.json"
LAYOUT = "Visual Genome's objects.json or region_descriptions.json"


def read(files: SplitFiles) -> Reading:
    """Read Visual Genome; the image folder contains `VG_100K` and `VG_100K_2`."""
    entries = read_json(files.path, LAYOUT)
    if not isinstance(entries, list):
        raise DataError(f"{files.path}: not a list; expected {LAYOUT}.")
    known = _image_data(files)
    problems: list[Problem] = []

    def numbered() -> Iterator[tuple[int, dict[str, Any]]]:
        seen: set[int] = set()
        for i, entry in enumerate(entries):
            fields = entry if isinstance(entry, dict) else {}
            found = fields.get("image_id", fields.get("id"))
            image_id = as_whole(found)
            if image_id is None or image_id not in known:
                problems.append(Problem("unknown_image", str(files.path), f"[{i}]", f"image_id {found!r:.40}"))
                continue
            if image_id in seen:
                problems.append(Problem("duplicate_id", str(files.path), f"image {image_id}"))
                continue
            seen.add(image_id)
            yield image_id, fields

    def parse(entry: tuple[int, dict[str, Any]]) -> SourceImage:
        image_id, fields = entry
        data = known[image_id]
        return SourceImage(
            file_name=files.image_name(_path(data)),
            key=f"image {image_id}",
            image_id=image_id,
            width=data.get("width"),
            height=data.get("height"),
            objects=tuple(_objects(fields)),
            file=str(files.path),
            metadata={"absent": []},
        )

    return Reading(numbered(), (), problems, parse)


def read_from(files: SplitFiles) -> list[Path]:
    """Both files with annotations."""
    return [files.path, files.path.parent / IMAGE_DATA]


def _image_data(files: SplitFiles) -> dict[int, dict[str, Any]]:
    path = files.path.parent / IMAGE_DATA
    rows = read_json(path, "Visual Genome's image_data.json")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: not a list of images; expected Visual Genome's image_data.json.")
    return {number: row for row in rows if (number := as_whole(row.get("image_id"))) is not None}


def _path(data: dict[str, Any]) -> object:
    url = data.get("url")
    return "/".join(url.split("/")[-2:]) if isinstance(url, str) else None


def _objects(entry: dict[str, Any]) -> Iterator[SourceObject]:
    listed = entry.get("regions", entry.get("objects"))
    for i, obj in enumerate(listed if isinstance(listed, list) else []):
        fields = obj if isinstance(obj, dict) else {}
        names = fields.get("names")
        desc = fields.get("phrase", names[0] if isinstance(names, list) and names else None)
        number = fields.get("region_id", fields.get("object_id"))
        size = [fields.get("w", fields.get("width")), fields.get("h", fields.get("height"))]
        box = corners_of_xywh([fields.get("x"), fields.get("y"), *size])
        yield SourceObject(desc, box, f"object {i if number is None else number}", has_size=True)
