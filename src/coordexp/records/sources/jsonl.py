"""JSONL in the record contract (`records.schema`), checked line by line: an invalid line is a counted problem."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coordexp.errors import DataError
from coordexp.records.schema import RECORDS, ObjectRecord, Record, parse_record
from coordexp.records.sources.base import Problem, Reading, SourceImage, SourceObject, SplitFiles
from coordexp.records.sources.files import opened, read_lines

LAYOUT = "records, one JSON object per line"


def read(files: SplitFiles) -> Reading:
    """Read one record per line; image paths are relative to the image folder."""
    path = files.path
    with opened(path, LAYOUT):
        problems: list[Problem] = []

    def images() -> Iterator[SourceImage]:
        seen: set[object] = set()
        with opened(path, LAYOUT) as handle:
            for number, line in read_lines(handle, path, LAYOUT):
                try:
                    record = parse_record(RECORDS.parse_json(line, f"line {number}"), f"line {number}")
                    _check_metadata(record.metadata, f"line {number}: metadata")
                except DataError as error:
                    problems.append(Problem("record_invalid", str(path), f"line {number}", str(error)))
                    continue
                image_id = _image_id(record)
                if image_id is not None and image_id in seen:
                    problems.append(Problem("duplicate_id", str(path), f"line {number}", f"image_id {image_id}"))
                    continue
                seen.add(image_id)
                yield _source_image(files, record, number, image_id)

    return Reading(images(), (), problems)


def _check_metadata(metadata: dict[str, Any], where: str) -> None:
    """Raise DataError for a value that prompts or evaluation cannot use."""
    for key in ("absent", "not_exhaustive"):
        if key in metadata and not _are_names(metadata[key]):
            raise DataError(f"{where}.{key} is {metadata[key]!r:.40}, expected a list of names; or leave it out.")
    if "phrase" in metadata and not _are_names([metadata["phrase"]]):
        raise DataError(f"{where}.phrase is {metadata['phrase']!r:.40}, expected text; or leave it out.")
    if "probe" in metadata:  # a probe is evaluated separately from other records
        raise DataError(f"{where}.probe is set, but only `convert` marks probes. Remove the key, or the line.")
    if "prompt" in metadata and not _is_prompt(metadata["prompt"]):
        raise DataError(
            f"{where}.prompt is {metadata['prompt']!r:.60}, expected a kind (open, closed, listed, phrase) with names, "
            "as `convert` writes it; or leave it out."
        )


def _is_prompt(value: object) -> bool:
    """Whether `text.prompts` can render it."""
    if not isinstance(value, dict) or not isinstance(value.get("style", 0), int):
        return False
    names = value.get("names")
    is_about_names = value.get("kind") in ("closed", "listed", "phrase") and bool(names) and _are_names(names)
    return value.get("kind") == "open" or is_about_names


def _are_names(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(name, str) for name in values)


def _image_id(record: Record) -> int | None:
    value = record.metadata.get("image_id")
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _source_image(files: SplitFiles, record: Record, number: int, image_id: int | None) -> SourceImage:
    metadata = {key: value for key, value in record.metadata.items() if key != "image_id"}
    return SourceImage(
        file_name=files.image_name(record.image),
        key=f"line {number}",
        image_id=image_id,
        width=record.width,
        height=record.height,
        objects=tuple(_source_object(obj, i) for i, obj in enumerate(record.objects)),
        file=str(files.path),
        metadata=metadata,
    )


def _source_object(obj: ObjectRecord, index: int) -> SourceObject:
    return SourceObject(
        desc=obj.desc,
        box_xyxy=obj.bbox_xyxy_px,
        key=f"objects[{index}]",
        iscrowd=bool(obj.metadata.get("iscrowd")),
        rings=(obj.poly_px,) if obj.poly_px else (),
        area_px2=obj.area_px2,
        metadata={key: value for key, value in obj.metadata.items() if key != "iscrowd"},
    )
