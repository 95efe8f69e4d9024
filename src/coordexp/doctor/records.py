"""Find all problems in a profile's data in one pass, before training.

This does the work of the raw and convert stages without writing anything. An error does not end the search, but becomes
a finding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coordexp.config.profile import DatasetConfig, RecordsConfig
from coordexp.errors import DataError
from coordexp.records.losses import NOTHING_LOST, any_counts, excessive_losses
from coordexp.records.manifest import SPLITS, inspect_all, located, of_split, open_split
from coordexp.records.mixing import overlap, split_dev
from coordexp.records.names import settle_names
from coordexp.records.policy import RecordSet, to_records
from coordexp.records.schema import Record
from coordexp.records.sources.base import Problem
from coordexp.records.store import RecordStore
from coordexp.records.twins import join_same_pictures

BAD_IMAGE = "image_"  # prefix of the reasons that drop a whole image
REACH_OUT = "boxes_reach_out"  # boxes that extend beyond their images are clipped
NOTED = NOTHING_LOST | {"names_merged", "same_picture", REACH_OUT}


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of problem in one split of one data set."""

    set_name: str
    split: str
    reason: str
    count: int
    stops: bool  # the stages would stop; otherwise they drop and count it
    examples: tuple[str, ...]

    @property
    def fate(self) -> str:
        """The reaction of the stages, in one word."""
        return "STOP" if self.stops else "noted" if self.reason in NOTED else "dropped"


@dataclass(slots=True)
class Examination:
    """The findings, and the remaining records for training and evaluation."""

    findings: list[Finding] = field(default_factory=list)
    records: dict[str, list[Record]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    image_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        """Whether a run would stop at any of the findings."""
        return any(f.stops for f in self.findings)


def examine(
    sets: Mapping[str, DatasetConfig], config: RecordsConfig, decode: bool, workers: int, examples: int = 3
) -> Examination:
    """Check every annotation and every image of the data sets.

    Args:
        sets: the data sets of a profile.
        config: its policies.
        decode: decode every image, which finds truncated files.
        workers: number of threads that read images.
        examples: maximum number of locations listed per finding.
    """
    result = Examination()
    content: dict[str, str] = {}
    read: dict[str, list[RecordSet]] = {}
    for name, dataset in sets.items():
        try:
            here = located(name, dataset)
        except DataError as error:
            result.findings.append(Finding(name, "all", "root_missing", 1, True, (str(error),)))
            continue
        for split in SPLITS:
            found = _examine_split(name, split, here, config, decode, workers, examples, result, content)
            read.setdefault(name, []).append(found)
    _examine_names(result, read, examples)
    _examine_overlap(result, content, config, examples)
    for split in SPLITS:
        if not result.records[split]:
            result.findings.append(Finding("all", split, "no_record_left", 1, True, ()))
        elif not any_counts(result.records[split]):
            result.findings.append(Finding("all", split, "no_object_left", 1, True, ()))
    return result


def _examine_split(
    name: str,
    split: str,
    dataset: DatasetConfig,
    config: RecordsConfig,
    decode: bool,
    workers: int,
    examples: int,
    result: Examination,
    content: dict[str, str],
) -> RecordSet:
    try:
        reading = open_split(dataset, split)
        if reading is None:
            return RecordSet()
        reading, names = reading.loaded()
    except DataError as error:
        result.findings.append(Finding(name, split, "annotations_unusable", 1, True, (str(error),)))
        return RecordSet()
    facts = inspect_all(Path(dataset.root), names, decode, workers)
    reading = of_split(reading, dataset, split, facts, config.val_fraction)
    found = to_records(reading, facts, config, split, prefix=f"{name}/", prompt=dataset.prompt)
    result.records[split] += found.records
    result.image_bytes += sum(f.n_bytes for f in facts.values())
    result.problems += found.problems
    content.update({f"{name}/{f.name}": f.sha256 for f in facts.values()})
    for reason, count in sorted(Counter(p.reason for p in found.problems).items()):
        shown = [str(p) for p in found.problems if p.reason == reason][:examples]
        stops = reason.startswith(BAD_IMAGE) and config.bad_images == "error"
        result.findings.append(Finding(name, split, reason, count, stops, tuple(shown)))
    if found.frames.beyond:
        shown = found.frames.examples[:examples]
        result.findings.append(Finding(name, split, REACH_OUT, found.frames.beyond, False, tuple(shown)))
    for excess in excessive_losses(found, config):
        shown = [excess.message, *excess.examples[:examples]]
        result.findings.append(Finding(name, split, excess.reason, excess.count, True, tuple(shown)))
    return found


def _examine_names(result: Examination, read: Mapping[str, list[RecordSet]], examples: int) -> None:
    names = settle_names(read)
    kinds = (("names_clash", names.refused), ("category_unused", names.unused), ("names_merged", names.merged))
    for reason, by_set in kinds:
        for name, texts in by_set.items():
            stops = reason == "names_clash"
            result.findings.append(Finding(name, "all", reason, len(texts), stops, tuple(texts[:examples])))


def _examine_overlap(result: Examination, content: Mapping[str, str], config: RecordsConfig, examples: int) -> None:
    train, val = ((r.image for r in result.records[split]) for split in SPLITS)
    shared = overlap(train, val, content)
    if shared:
        shown = tuple(f"{a} is {b}" for a, b in sorted(shared.items())[:examples])
        stops = config.overlap == "error"
        result.findings.append(Finding("all", "train", "train_image_in_val", len(shared), stops, shown))
    for split, records in result.records.items():
        joined = join_same_pictures(RecordStore(records), content, config.same_picture)
        for reason, found, stops in (
            ("same_picture", list(map(str, joined.problems)), False),
            ("picture_contradicts_itself", joined.conflicts, True),
        ):
            if found:
                result.findings.append(Finding("all", split, reason, len(found), stops, tuple(found[:examples])))
    left = [r for r in result.records["train"] if r.image not in shared]
    images = {content[r.image] for r in left}
    if images and config.dev_images >= len(images):
        where = f"records.dev_images is {config.dev_images}, but there are {len(images)} different training images"
        result.findings.append(Finding("all", "train", "no_image_left_beside_dev", 1, True, (where,)))
    elif images and not any_counts(split_dev(left, config.dev_images, content)[1]):
        result.findings.append(Finding("all", "dev", "no_object_left", 1, True, ("increase records.dev_images",)))
