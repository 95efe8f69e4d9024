"""One annotation file of any source format to records, outside of a profile: `coordexp convert`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from coordexp.errors import DataError
from coordexp.records.losses import NOTHING_LOST, by_reason, examples, refuse_losses
from coordexp.records.manifest import Watch, inspect_all
from coordexp.records.names import refuse_clashes, settle_names
from coordexp.records.policy import Policies, RecordSet, refuse_bad_images, to_records
from coordexp.records.schema import Record
from coordexp.records.sources.base import Problem, Reading, SplitFiles
from coordexp.records.sources.coco import instances_reading, load_instances
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
        n_lost = sum(p.reason not in NOTHING_LOST for p in self.problems)
        return [
            f"{len(self.records)} images, {len(objects)} objects, {crowds} of them crowd regions",
            *(f"  {example}" for example in examples(self.problems)),
            f"dropped: {n_lost} boxes{', ' if counts else ''}{counts}",
        ]


def convert_file(
    source: str,
    annotations: Path,
    images: Path,
    split: str,
    policies: Policies,
    watch: Watch = lambda found, total: found,
) -> ConvertedFile:
    """Convert one file by the reader, the checks of images and the policies that the graph uses.

    Every image must be there in its annotated size, as a viewer shows it, and is unpacked once.

    Args:
        source: a format of `records.sources.registry`.
        annotations: its annotation file (docs/data.md says which one).
        images: the folder that file names start from.
        split: "train" or "val": which part of a file that holds both.
        policies: what to do with the unusual.
        watch: passes the facts of images on, and may show how far it is of how many.

    Raises:
        DataError: the file is not of that format, images cannot be used, or too much is lost; the first are named.
    """
    root = Path(os.path.commonpath([annotations.absolute().parent, images.absolute()]))
    below = images.absolute().relative_to(root).as_posix()
    files = SplitFiles(root, annotations.absolute().relative_to(root).as_posix(), below, split)
    reading = _read(source, files)
    found = list(reading.images)
    names = {str(image.file_name) for image in found}
    facts = inspect_all(root, names, decode=True, workers=os.cpu_count() or 1, watch=watch)
    result = to_records(Reading(found, reading.categories, reading.problems), policies, facts)
    _refuse_other_folder(result, images)
    refuse_bad_images(result.bad_images)
    _refuse(annotations, result, policies)
    if not result.records:
        raise DataError(f"{annotations}: no record is left of split {split!r}; nothing was written.")
    prefix = "" if below == "." else f"{below}/"
    records = tuple(replace(r, image=r.image.removeprefix(prefix)) for r in result.records)
    return ConvertedFile(records, tuple(result.problems))


def _refuse(annotations: Path, result: RecordSet, policies: Policies) -> None:
    """Raise DataError if too much of the file is lost, or if two of its categories have one name."""
    refuse_losses({str(annotations): (result, policies)})
    refuse_clashes(settle_names({str(annotations): [result]}))


def _read(source: str, files: SplitFiles) -> Reading:
    """As the graph reads it, except that an entry of a COCO file that is none (a size of null) is an error here."""
    if source != "coco":
        return READERS[source](files)
    instances = load_instances(files.path, strict=True, polygons=False)
    return instances_reading(instances, lambda image: files.image_name(image["file_name"]))


def _refuse_other_folder(result: RecordSet, images: Path) -> None:
    """Raise DataError if not one image is there: then it is the folder that is wrong."""
    if not result.records and result.bad_images and {p.reason for p in result.bad_images} == {"image_missing"}:
        raise DataError(
            f"{images}: none of the {len(result.bad_images)} annotated images is there (first: "
            f"{result.bad_images[0]}). Expected the folder that the file names start from: is --images right?"
        )
