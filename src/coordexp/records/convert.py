"""Convert annotations to records: the data sets of a profile, a single file, or a sample of a profile.

`convert_sets` reads, applies the policies, stops if too much is lost, and unifies names. A profile then mixes its sets
into splits (`records.mixing`); `coordexp convert` writes the records as they are.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from pathlib import Path

from coordexp.config.formats import BoxForm, Format
from coordexp.config.profile import AUTO_SPLIT, NO_SPLIT, DatasetConfig, RecordsConfig
from coordexp.errors import DataError
from coordexp.infra.files import replacing
from coordexp.infra.workers import worker_count
from coordexp.records.categories import Category, Split
from coordexp.records.images import ImageFacts
from coordexp.records.losses import (
    NOTHING_LOST,
    SHOWN,
    by_reason,
    examples,
    refuse_bad_images,
    refuse_empty,
    refuse_losses,
)
from coordexp.records.manifest import (
    READERS,
    SPLITS,
    Watch,
    inspect_all,
    located,
    of_split,
    open_split,
    own_splits,
    read_manifest,
)
from coordexp.records.mixing import (
    SetNames,
    overlap,
    probes,
    repeat_by_weight,
    split_dev,
    with_prompt,
    with_unique_ids,
    with_views,
    without_some,
)
from coordexp.records.names import refuse_clashes, respelled, settle_names
from coordexp.records.policy import INCOMPLETE, to_records
from coordexp.records.schema import Record, json_line, write_records
from coordexp.records.sources.base import Problem, Reading, SourceImage, SplitFiles
from coordexp.records.store import RecordStore
from coordexp.records.twins import join_same_pictures

# Policies of `coordexp convert`; its options change `crowd` and `max_lost`.
FILE_POLICIES = RecordsConfig(
    dev_images=1, crowd="ignore", truncated="keep", min_side_px=1.0, min_inside=0.0, polygons="drop", max_objects=0,
    over_max="sample", bad_images="error", max_lost=0.05, wordings=1, listed_names=20, listed_present=1.0,
    listed_hard=0.0, negative_rate=0.0, mixed_listed=0.0, mixed_phrase=0.0, flip=0.0, crop=0.0, scale_jitter=0.0,
    overlap="error", same_picture="file",
)  # fmt: skip
SAMPLE_IMAGES = "images"  # in a sample: a link to the root of the data set


@dataclass(frozen=True, slots=True)
class OpenedSet:
    """A data set to convert: a reading of each split, the facts of its images, and the kind of its prompts."""

    readings: Mapping[str, Reading]
    facts: Mapping[str, ImageFacts]
    prompt: str = "open"


@dataclass(slots=True)
class Converted:
    """Records by split, declared categories by set, and dropped annotations by split."""

    splits: dict[str, RecordStore]
    declared: dict[str, tuple[Category, ...]]
    problems: dict[str, list[Problem]]
    notes: list[str]  # names that were changed
    spelling: dict[str, str] = field(default_factory=dict)  # spelling in a source -> spelling in the records
    left_out: RecordStore = field(default_factory=RecordStore)  # objects of training records that `missing` removed
    workers: int = 1

    def drops(self) -> dict[str, dict[str, int]]:
        """Counts of dropped annotations by split and reason."""
        return {split: dict(sorted(Counter(p.reason for p in ps).items())) for split, ps in self.problems.items()}

    def sets(self) -> dict[str, dict[str, int]]:
        """Counts of records by set and split."""
        counts = {split: Counter(i.partition("/")[0] for i in rs.images()) for split, rs in self.splits.items()}
        return {name: {split: counts[split][name] for split in self.splits} for name in self.declared}

    def categories(self) -> list[Category]:
        """Every category that val may contain, and whether it is held out of training.

        A category is held out if training does not contain it. If a file marks held-out categories itself, its other
        categories count as trained. A single data set keeps the ids of its file.
        """
        trained, found = (_descs(self.splits[split], self.workers) for split in SPLITS)
        declared = [c for categories in self.declared.values() for c in categories]
        marked: dict[str, Split] = {c.name: c.split for c in declared if c.split not in (None, "train")}
        trained |= {c.name for c in declared if marked and c.split == "train"}

        def split_of(name: str) -> Split:
            return "train" if name in trained else marked.get(name, "held_out")

        others = sorted(found - {c.name for c in declared})
        if len(self.declared) == 1 and declared:
            first = max(c.id for c in declared) + 1
            numbered = [*declared, *(Category(i, name) for i, name in enumerate(others, first))]
        else:
            names = sorted({c.name for c in declared}.union(others))
            numbered = [Category(i, name) for i, name in enumerate(names, 1)]
        return [replace(c, split=split_of(c.name), aliases=self._aliases(c.name)) for c in numbered]

    def _aliases(self, name: str) -> tuple[str, ...]:
        return tuple(sorted(found for found, written in self.spelling.items() if written == name != found))

    def named(self) -> list[Category]:
        """Every declared category and every other name that occurs; declared ones keep their ids."""
        declared = {c.name: c for categories in self.declared.values() for c in categories}
        found = set().union(*(_descs(records, self.workers) for records in self.splits.values()))
        first = max((c.id for c in declared.values()), default=0) + 1
        others = (Category(number, name) for number, name in enumerate(sorted(found - declared.keys()), first))
        return [*declared.values(), *others]

    def summary(self) -> list[str]:
        """Lines with totals, examples of dropped annotations, and their counts by reason."""
        problems = [p for split in self.problems.values() for p in split]
        n_records = sum(map(len, self.splits.values()))
        crowds = [bool(o.metadata.get("iscrowd")) for rs in self.splits.values() for r in rs for o in r.objects]
        n_lost, counts = sum(p.reason not in NOTHING_LOST | {INCOMPLETE} for p in problems), by_reason(problems)
        return [
            f"{n_records} images, {len(crowds)} objects, {sum(crowds)} of them crowd regions",
            *(f"  {example}" for example in examples(problems)),
            *(f"  {note}" for note in self.notes),
            f"dropped: {n_lost} boxes{', ' if counts else ''}{counts}",
        ]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Disable garbage collection: searching millions of records for cycles takes a fifth of the time and finds none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_uncollected()
def convert_sets(opened: Mapping[str, OpenedSet], config: RecordsConfig, seed: int, workers: int = 1) -> Converted:
    """Convert every split of every set; images are named `<set>/<path below its root>`.

    The result does not depend on the number of `workers`, processes that share the images of each split.

    Raises:
        DataError: images cannot be used (`bad_images: error`), too much is lost (`max_lost`), two categories have the
            same name, or a split is empty; the message has counts and examples.
    """
    found = {
        name: {
            split: to_records(
                reading, a.facts, config, split, prefix=f"{name}/", prompt=a.prompt, seed=seed, workers=workers
            )
            for split, reading in a.readings.items()
        }
        for name, a in opened.items()
    }
    parts = {f"{name}/{split}": part for name, splits in found.items() for split, part in splits.items()}
    if config.bad_images == "error":
        refuse_bad_images(parts)
    refuse_losses(parts, config)
    settled = settle_names({name: list(splits.values()) for name, splits in found.items()})
    refuse_clashes(settled)
    result = Converted({}, settled.categories, {}, settled.notes(), settled.spelling, workers=workers)
    content = {f"{name}/{f.name}": f.sha256 for name, a in opened.items() for f in a.facts.values()}
    conflicts: list[str] = []
    for split in SPLITS:
        parts_of = [splits[split] for splits in found.values() if split in splits]
        records = RecordStore()
        for part in parts_of:
            records.extend(respelled(part.records, settled.spelling))
            part.records = RecordStore()
        joined = join_same_pictures(records, content, config.same_picture)
        result.splits[split] = joined.records
        result.problems[split] = [p for part in parts_of for p in part.problems] + joined.problems
        conflicts += joined.conflicts
        if parts_of and not result.splits[split]:
            raise DataError(f"no {split} record is left; dropped: {result.drops()[split]}.")
    if conflicts:
        shown = "".join(f"\n  {conflict}" for conflict in conflicts[:SHOWN])
        raise DataError(
            f"{len(conflicts)} images are annotated more than once with contradicting annotations:{shown}\n"
            "Remove the wrong ones, or set records.same_picture to first (keeps the first record of an image) or keep."
        )
    return result


@_uncollected()
def convert_datasets(raw: Path, config: RecordsConfig, seed: int, workers: int = 1) -> Converted:
    """The splits of a profile (train, dev, val) from the sets of its manifest.

    Raises:
        DataError: as `convert_sets`; train and val share images (`overlap: error`), or a split has no valid object.
    """
    sets, facts = read_manifest(raw)
    opened = {
        name: OpenedSet(_readings(dataset, config, facts[name]), facts[name], dataset.prompt)
        for name, dataset in sets.items()
    }
    result = convert_sets(opened, config, seed, workers)
    content = {f"{name}/{f.name}": f.sha256 for name in sets for f in facts[name].values()}
    val = result.splits["val"]
    train = _without_overlap(result, content, config)
    names = {name: _names(result.declared[name], (train, val), name) for name in sets}
    is_single = len(sets) == 1
    complete, dev = split_dev(with_unique_ids(train, is_single), config.dev_images, content)
    train, result.left_out = without_some(complete, config.missing, seed)
    result.splits = {"train": train, "dev": dev, "val": with_unique_ids(val, is_single)}
    for split, records in result.splits.items():

        def finished(batch: Iterable[Record], split: str = split) -> RecordStore:
            return RecordStore(_finished(batch, split, sets, names, config, seed))

        result.splits[split] = RecordStore()
        for part in _by_set(records, sets).map_records(finished, workers):
            result.splits[split].extend(part)
    refuse_empty(result.splits)
    return result


def _by_set(records: RecordStore, sets: Iterable[str]) -> RecordStore:
    """The records sorted by data set, in the order of the sets."""
    order = {name: number for number, name in enumerate(sets)}
    found = [order[image.partition("/")[0]] for image in records.images()]
    return records.taken(sorted(range(len(found)), key=found.__getitem__)) if len(order) > 1 else records


def _finished(
    records: Iterable[Record], split: str, sets: Mapping[str, DatasetConfig], names: Mapping[str, SetNames],
    config: RecordsConfig, seed: int,
) -> Iterator[Record]:  # fmt: skip
    """The final records of a split: repeated by the weight of their set, in a random view, with their prompt.

    A record of val is followed by the probes of its image.
    """
    for record in records:
        name = record.image.partition("/")[0]
        kind = sets[name].prompt
        if split == "train":
            copies = with_views(repeat_by_weight([record], sets[name].weight, seed), config, seed)
            yield from (with_prompt(r, kind, names[name], config, seed, True) for r in copies)
            continue
        yield with_prompt(record, kind, names[name], config, seed, False)
        if split == "val" and kind == "mixed":
            yield from probes(record, names[name], config, seed)


def _readings(dataset: DatasetConfig, config: RecordsConfig, facts: Mapping[str, ImageFacts]) -> dict[str, Reading]:
    opened = {split: open_split(dataset, split, polygons=config.polygons == "keep") for split in SPLITS}
    return {
        split: of_split(reading, dataset, split, facts, config.val_fraction)
        for split, reading in opened.items()
        if reading
    }


def _without_overlap(result: Converted, content: Mapping[str, str], config: RecordsConfig) -> RecordStore:
    """The training records whose image is not in val; the others become problems."""
    train = result.splits["train"]
    shared = overlap(train.images(), result.splits["val"].images(), content)
    if shared and config.overlap == "error":
        pairs = "".join(f"\n  {a} is {b}" for a, b in sorted(shared.items())[:SHOWN])
        raise DataError(
            f"{len(shared)} training images have the same content as a val image:{pairs}\nResults on val would be "
            "meaningless. Remove them, or set records.overlap to drop_train."
        )
    result.problems["train"] += [Problem("image_in_val", a, b) for a, b in sorted(shared.items())]
    return train.taken(i for i, image in enumerate(train.images()) if image not in shared) if shared else train


def _names(declared: Sequence[Category], splits: Iterable[Iterable[Record]], name: str) -> SetNames:
    """The category names of a set (declared, or else occurring), and those of training."""
    if not declared:
        of_set = (r for records in splits for r in records if r.image.startswith(f"{name}/"))
        return SetNames.of(names := sorted({o.desc for r in of_set for o in r.objects}), names)
    return SetNames.of([c.name for c in declared], [c.name for c in declared if c.split == "train"])


def _descs(records: RecordStore, workers: int) -> set[str]:
    return set().union(*records.map_records(lambda batch: {o.desc for r in batch for o in r.objects}, workers))


def write_split(path: Path, records: RecordStore, workers: int) -> int:
    """Write the records of a split as `write_records` does; returns the number of objects."""

    def lines(batch: Iterable[Record]) -> tuple[bytes, int]:
        text = "".join(json_line(record) for record in batch)
        return text.encode(), sum(len(r.objects) for r in batch)

    n_objects = 0
    with replacing(path) as temporary, temporary.open("wb") as out:
        for content, count in records.map_records(lines, workers):
            out.write(content)
            n_objects += count
    return n_objects


def convert_file(
    fmt: Format,
    annotations: Path,
    images: Path,
    split: str,
    config: RecordsConfig = FILE_POLICIES,
    boxes: BoxForm = "format",
    watch: Watch = lambda found, total: found,
) -> Converted:
    """Convert one annotation file outside a profile; image names are relative to `images`.

    Args:
        fmt: the format of the file.
        annotations: the file (docs/data.md names the file of each format).
        images: the folder that file names are relative to.
        split: "train" or "val": the part to read from a file with both.
        config: the policies.
        boxes: units and layout of the box coordinates.
        watch: wraps the iteration over image facts, for example to show progress.

    Raises:
        DataError: the file does not have this format, or as `convert_sets`.
    """
    root = Path(os.path.commonpath([annotations.absolute().parent, images.absolute()]))
    below = images.absolute().relative_to(root).as_posix()
    files = SplitFiles(
        root, annotations.absolute().relative_to(root).as_posix(), below, split, config.polygons == "keep"
    )
    workers = worker_count()
    names = READERS[fmt](files).image_names(workers)
    facts = inspect_all(root, names, decode=True, workers=workers, watch=watch)
    reading = READERS[fmt](files).with_boxes(boxes)
    result = convert_sets({annotations.name: OpenedSet({split: reading}, facts)}, config, seed=0, workers=workers)
    prefix = f"{annotations.name}/" if below == "." else f"{annotations.name}/{below}/"
    result.splits = {split: RecordStore(replace(r, image=r.image.removeprefix(prefix)) for r in result.splits[split])}
    return result


def write_sample(
    sets: Mapping[str, DatasetConfig], config: RecordsConfig, folder: Path, count: int
) -> dict[str, DatasetConfig]:
    """Write `count` records of each split of each set to `folder`, selected by a hash of the image name.

    Returns the sets that replace the given ones, in the format `jsonl`; unusable images are left out. Raises DataError,
    as the raw stage does, if annotations are missing or have another format.
    """
    return {name: _sample_set(located(name, dataset), config, folder / name, count) for name, dataset in sets.items()}


def _sample_set(dataset: DatasetConfig, config: RecordsConfig, folder: Path, count: int) -> DatasetConfig:
    root = Path(dataset.root)
    folder.mkdir(parents=True)
    (folder / SAMPLE_IMAGES).symlink_to(root, target_is_directory=True)
    files = dict.fromkeys(SPLITS, NO_SPLIT)
    if dataset.val == AUTO_SPLIT:
        files["val"] = AUTO_SPLIT
    for split in own_splits(dataset):
        if not (reading := open_split(dataset, split, polygons=config.polygons == "keep")):
            continue
        chosen = Reading(nsmallest(count, reading.images, key=_digest), reading.categories, [])
        facts = inspect_all(root, chosen.image_names(workers=1), decode=True, workers=4)
        files[split] = f"{split}.jsonl"
        write_records(folder / files[split], to_records(chosen, facts, config, split).records)
    changes = {
        "format": "jsonl",
        "boxes": "format",
        "root": str(folder),
        "train_images": SAMPLE_IMAGES,
        "val_images": SAMPLE_IMAGES,
    }
    return dataset.model_copy(update=changes | files)


def _digest(image: SourceImage) -> str:
    return hashlib.sha256(f"{image.file_name}:{image.key}".encode()).hexdigest()
