"""One annotation file of any source format to records, outside of a profile: `coordexp convert`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from coordexp.errors import DataError
from coordexp.records.losses import by_reason, examples, refuse_losses
from coordexp.records.manifest import inspect_all
from coordexp.records.names import refuse_clashes, settle_names
from coordexp.records.policy import Policies, RecordSet, refuse_bad_images, to_records
from coordexp.records.schema import Record, parse_record
from coordexp.records.sources.base import Problem, Reading, SplitFiles
from coordexp.records.sources.coco import read_coco
from coordexp.records.sources.registry import READERS


@dataclass(frozen=True, slots=True)
class ConvertedFile:
    """Records whose images are relative to the image folder, and what was not kept."""

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]

    def summary(self) -> list[str]:
        """What is there, examples of what was not kept, and counts of it by reason: a line each."""
        objects = [o for record in self.records for o in record.objects]
        crowds = sum(1 for o in objects if o.metadata.get("iscrowd"))
        counts = by_reason(self.problems)
        return [
            f"{len(self.records)} images, {len(objects)} objects, {crowds} of them crowd regions",
            *(f"  {example}" for example in examples(self.problems)),
            f"dropped: {len(self.problems)} boxes{', ' if counts else ''}{counts}",
        ]


def convert_coco(
    annotations: Path,
    images: Path,
    policies: Policies,
    watch: Callable[[Sequence[Record]], Iterable[Record]] = iter,
) -> ConvertedFile:
    """Convert one COCO instances file, where anything that is not of the format is an error.

    Args:
        annotations: the instances file.
        images: the folder that its file names start from; each image must be there in its annotated size.
        policies: what to do with the unusual.
        watch: passes the records on, and may show how far it is.

    Raises:
        DataError: naming the first entry or image that cannot be used, or what is lost if it is too much.
    """
    result = read_coco(annotations, "", policies)
    for record in watch(result.records):
        _check_image(record, images, f"{annotations}: image {record.metadata['image_id']}")
    _refuse(annotations, result, policies)
    return ConvertedFile(tuple(result.records), tuple(result.problems))


def _refuse(annotations: Path, result: RecordSet, policies: Policies) -> None:
    """Raise DataError if too much of the file is lost, or if two of its categories have one name."""
    refuse_losses({str(annotations): (result, policies)})
    refuse_clashes(settle_names({str(annotations): [result]}))


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


def convert_file(source: str, annotations: Path, images: Path, split: str, policies: Policies) -> ConvertedFile:
    """Convert one file; every image is unpacked once.

    Args:
        source: a format of `records.sources.registry`.
        annotations: its annotation file (docs/data.md says which one).
        images: the folder that file names start from.
        split: "train" or "val": which part of a file that holds both.
        policies: what to do with the unusual.

    Raises:
        DataError: the file is not of that format, images cannot be used, or too much is lost; the first are named.
    """
    root = Path(os.path.commonpath([annotations.absolute().parent, images.absolute()]))
    below = images.absolute().relative_to(root).as_posix()
    files = SplitFiles(root, annotations.absolute().relative_to(root).as_posix(), below, split)
    reading = READERS[source](files)
    found = list(reading.images)
    names = {str(image.file_name) for image in found}
    facts = inspect_all(root, names, decode=True, workers=os.cpu_count() or 1)
    result = to_records(Reading(found, reading.categories, reading.problems), policies, facts)
    refuse_bad_images(result.bad_images)
    _refuse(annotations, result, policies)
    if not result.records:
        raise DataError(f"{annotations}: no record is left of split {split!r}; nothing was written.")
    prefix = "" if below == "." else f"{below}/"
    records = tuple(replace(r, image=r.image.removeprefix(prefix)) for r in result.records)
    return ConvertedFile(records, tuple(result.problems))
