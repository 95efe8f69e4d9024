"""Recognize the format of a folder: annotation files, splits and images, as the keys of a data set of a profile.

Each format is recognized by marks in its own files (`records.recognizers`), never by folder names alone. Then a sample
of images is read, which reveals missing files, lost objects, and boxes in another form than that of the format.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from coordexp.config.formats import BoxForm, Format
from coordexp.config.profile import DatasetConfig
from coordexp.errors import DataError
from coordexp.records.box_frames import BoxFrames
from coordexp.records.images import inspect_image
from coordexp.records.manifest import open_split
from coordexp.records.policy import image_problem
from coordexp.records.recognizers import RECOGNIZERS, Folder, Found
from coordexp.records.sources.base import Reading
from coordexp.records.sources.files import opened_parquet

SAMPLE_IMAGES = 200


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to read a folder.

    `keys` is a complete block `source.sets.<name>` of a profile. `problems` describes the problems of the sample.
    """

    format: Format
    keys: dict[str, Any]
    why: str
    images: int  # number of images in its image folders or parquet files
    objects: int  # number of objects in the sample
    problems: tuple[str, ...]

    def dataset(self) -> DatasetConfig:
        """The keys as a parameter block."""
        return DatasetConfig.model_validate(self.keys)


def recognize_folder(path: Path) -> list[Candidate]:
    """Every way to read a folder of annotated images, the most probable first; empty if there is none.

    Raises:
        DataError: the path is not a folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected a folder of annotated images.")
    folder = Folder(path.absolute())
    found = [
        candidate
        for recognizer in RECOGNIZERS
        for splits in recognizer(folder)
        if (candidate := _tried(folder, splits))
    ]
    return sorted(found, key=lambda c: (c.objects == 0, len(c.problems) > 0))


def _tried(folder: Folder, found: Found) -> Candidate | None:
    """The candidate with the problems of a sample of its training images."""
    keys: dict[str, Any] = {
        "format": found.format, "root": str(folder.root), "train": found.train, "val": found.val,
        "train_images": found.train_images or ".", "val_images": found.val_images or found.train_images or ".",
        "weight": 1.0, "prompt": found.prompt,
    }  # fmt: skip
    dataset = DatasetConfig.model_validate(keys)
    problems = list(found.notes)
    try:
        frames, n_objects, missing, n_images = _sampled(dataset)
    except DataError as error:
        return Candidate(found.format, keys, found.why, 0, 0, (*problems, str(error)))
    form = frames.other_form()
    if form in get_args(BoxForm):
        keys["boxes"] = form
        problems.append(f"boxes are read as {form}: {frames.cause()}")
    elif cause := frames.cause():
        problems.append(cause)
    if missing:
        shown = "; ".join(f"{reason} {count}" for reason, count in sorted(missing.items()))
        problems.append(f"in a sample of {n_images} images: {shown}")
    if not n_objects:
        problems.append("no object in the sample of images")
    embedded = found.format == "hub"
    count = _rows(folder, found) if embedded else folder.count(keys["train_images"], keys["val_images"])
    return Candidate(found.format, keys, found.why, count, n_objects, tuple(problems))


def _rows(folder: Folder, found: Found) -> int:
    count = 0
    for name in folder.by_suffix[".parquet"]:
        with opened_parquet(folder.root / name, "parquet") as table:
            count += table.metadata.num_rows
    return count


def _sampled(dataset: DatasetConfig) -> tuple[BoxFrames, int, Counter[str], int]:
    """For the first training images: frames of boxes, number of objects, problems by reason, number of images."""
    reading = open_split(dataset, "train") or Reading((), (), [])
    frames, missing = BoxFrames(), Counter[str]()
    n_objects = n_images = 0
    for image in islice(reading.images, SAMPLE_IMAGES):
        n_images += 1
        name = str(image.file_name)
        facts = {name: inspect_image(Path(dataset.root), name, decode=False)}
        if problem := image_problem(replace(image, file_name=name), facts):
            missing[problem.reason] += 1
            continue
        for obj in image.objects:
            n_objects += 1
            if obj.box_xyxy is not None:
                frames.add(obj, facts[name].width, facts[name].height, lambda: "")
    missing.update(p.reason for p in reading.problems)
    return frames, n_objects, missing, n_images
