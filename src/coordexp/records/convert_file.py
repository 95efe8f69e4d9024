"""One annotation file of any source format to records, outside of a profile: `coordexp convert`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from coordexp.errors import DataError
from coordexp.records.manifest import inspect_all
from coordexp.records.policy import Policies, refuse_bad_images, to_records
from coordexp.records.schema import Record, parse_record
from coordexp.records.sources.base import Reading, SplitFiles
from coordexp.records.sources.coco import read_coco
from coordexp.records.sources.registry import READERS


@dataclass(frozen=True, slots=True)
class ConvertedFile:
    """Records whose images are relative to the image folder, and what was not kept."""

    records: tuple[Record, ...]
    drops: Counter[str]  # by reason


def convert_coco(
    annotations: Path, images: Path, watch: Callable[[Sequence[Record]], Iterable[Record]] = iter
) -> ConvertedFile:
    """Convert one COCO instances file, where anything that is not of the format is an error.

    Args:
        annotations: the instances file.
        images: the folder that its file names start from; each image must be there in its annotated size.
        watch: passes the records on, and may show how far it is.

    Raises:
        DataError: naming the first entry or image that cannot be used.
    """
    conversion = read_coco(annotations, image_prefix="")
    for record in watch(conversion.records):
        _check_image(record, images, f"{annotations}: image {record.metadata['image_id']}")
    return ConvertedFile(conversion.records, Counter(conversion.drops))


def _check_image(record: Record, folder: Path, where: str) -> None:
    """Raise DataError unless the record keeps the contract and its image is there in the size that it says."""
    parse_record(record.to_json(), where)
    path = folder / record.image
    try:
        with Image.open(path) as image:
            size = image.size
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image, but {where} names it. Is --images the right folder?") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); {where} names it.") from error
    if size != (record.width, record.height):
        raise DataError(f"{path}: is {size[0]} x {size[1]} px, but {where} says {record.width} x {record.height}.")


def convert_file(source: str, annotations: Path, images: Path, split: str) -> ConvertedFile:
    """Convert one file under the default policies; every image is unpacked once.

    Args:
        source: a format of `records.sources.registry`.
        annotations: its annotation file (docs/data.md says which one).
        images: the folder that file names start from.
        split: "train" or "val": which part of a file that holds both.

    Raises:
        DataError: the file is not of that format, or images cannot be used; the first of them are named.
    """
    root = Path(os.path.commonpath([annotations.absolute().parent, images.absolute()]))
    below = images.absolute().relative_to(root).as_posix()
    files = SplitFiles(root, annotations.absolute().relative_to(root).as_posix(), below, split)
    reading = READERS[source](files)
    found = list(reading.images)
    names = {str(image.file_name) for image in found}
    facts = inspect_all(root, names, decode=True, workers=os.cpu_count() or 1)
    result = to_records(Reading(found, reading.categories, reading.problems), Policies(), facts)
    refuse_bad_images(result.bad_images)
    if not result.records:
        raise DataError(f"{annotations}: no record is left of split {split!r}; nothing was written.")
    prefix = "" if below == "." else f"{below}/"
    records = tuple(replace(r, image=r.image.removeprefix(prefix)) for r in result.records)
    return ConvertedFile(records, Counter(p.reason for p in result.problems))
