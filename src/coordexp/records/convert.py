"""Data sets on disk to the splits of a profile: read, apply the policies, part, mix, and account for every loss."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coordexp.config.profile import RecordsConfig
from coordexp.errors import DataError
from coordexp.records.augment import Augmentation
from coordexp.records.categories import Category
from coordexp.records.images import ImageFacts
from coordexp.records.losses import refuse_empty, refuse_losses
from coordexp.records.manifest import SPLITS, open_split, read_manifest
from coordexp.records.mixing import PromptPlan, repeat_by_weight, with_prompt, with_unique_ids, with_views
from coordexp.records.names import refuse_clashes, respelled, settle_names
from coordexp.records.policy import SHOWN, Policies, RecordSet, refuse_bad_images, to_records
from coordexp.records.schema import Record
from coordexp.records.sources.base import Problem
from coordexp.records.splits import overlap, split_dev


@dataclass(slots=True)
class Converted:
    """The records of a profile, its categories, and what was lost by split."""

    splits: dict[str, list[Record]] = field(default_factory=dict)  # train, dev, val
    categories: list[Category] = field(default_factory=list)
    problems: dict[str, list[Problem]] = field(default_factory=dict)  # train, val
    sets: dict[str, dict[str, int]] = field(default_factory=dict)  # set -> records by split, after weights
    notes: list[str] = field(default_factory=list)  # names that were changed

    def drops(self) -> dict[str, dict[str, int]]:
        """Counts by split and reason."""
        return {split: dict(sorted(Counter(p.reason for p in ps).items())) for split, ps in self.problems.items()}


def policies_of(config: RecordsConfig, split: str) -> Policies:
    """The policies of a split: what is evaluated is never thinned out."""
    policies = Policies(**config.model_dump(include=set(Policies.__slots__)))
    return policies if split == "train" else replace(policies, max_objects=0)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: to look for cycles in millions of records that hold none is a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_uncollected()
def convert_datasets(raw: Path, config: RecordsConfig, seed: int) -> Converted:
    """Convert the sets of a manifest.

    Raises:
        DataError: images cannot be used (`bad_images: error`), too much is lost (`max_lost`), two categories have one
            name, train and val share images (`overlap: error`), or a split is empty; the message counts and names them.
    """
    manifest, facts = read_manifest(raw)
    sets: Mapping[str, Any] = manifest["sets"]
    read = {name: _read_set(name, sets[name], facts[name], config, seed) for name in sets}
    problems = {split: [p for r in read.values() for p in r[split].problems] for split in SPLITS}
    result = Converted(problems=problems)
    if config.bad_images == "error":
        refuse_bad_images([p for r in read.values() for split in r.values() for p in split.bad_images])
    refuse_losses({f"{name}/{s}": (r[s], policies_of(config, s)) for name, r in read.items() for s in SPLITS})
    settled = settle_names({name: [r[split] for split in SPLITS] for name, r in read.items()})
    refuse_clashes(settled)
    result.notes = settled.notes()
    content = {f"{name}/{f.name}": f.sha256 for name in sets for f in facts[name].values()}
    train, val = (respelled([r for name in sets for r in read[name][s].records], settled.spelling) for s in SPLITS)
    train = _without_overlap(train, val, content, config, result.problems["train"])
    for split, records in (("train", train), ("val", val)):
        if not records:
            raise DataError(f"{raw}: no {split} record is left; the drops are {result.drops()[split]}.")
    declared = settled.categories
    names = {name: _names(name, declared[name], [*train, *val]) for name in sets}
    plans = {
        name: PromptPlan(sets[name]["prompt"], names[name], config.listed_names, config.negative_rate, seed)
        for name in sets
    }
    is_single = len(sets) == 1
    train, dev = split_dev(with_unique_ids(train, is_single), config.dev_images, content)
    weighted = [r for name in sets for r in repeat_by_weight(_of(train, name), sets[name]["weight"], seed)]
    how = Augmentation(config.flip, config.crop, config.scale_jitter)
    if not how.is_off:
        weighted = with_views(weighted, how, seed)
    result.splits = {"train": _prompted(weighted, plans, True)}
    result.splits["dev"] = _prompted(dev, plans, False)
    result.splits["val"] = _prompted(with_unique_ids(val, is_single), plans, False)
    refuse_empty(result.splits)
    result.categories = _categories(list(declared.values()), result.splits)
    result.sets = {name: {split: len(_of(rs, name)) for split, rs in result.splits.items()} for name in sets}
    return result


def _read_set(
    name: str, described: Mapping[str, Any], facts: Mapping[str, ImageFacts], config: RecordsConfig, seed: int
) -> dict[str, RecordSet]:
    found = {}
    for split in SPLITS:
        policies = policies_of(config, split)
        reading = open_split(described, split, polygons=policies.polygons == "keep")
        if reading:
            asks_phrases = described["prompt"] == "phrase"
            found[split] = to_records(reading, policies, facts, f"{name}/", seed, asks_phrases)
        else:
            found[split] = RecordSet()
    return found


def _without_overlap(
    train: list[Record], val: list[Record], content: Mapping[str, str], config: RecordsConfig, problems: list[Problem]
) -> list[Record]:
    shared = overlap(train, val, content)
    if shared and config.overlap == "error":
        pairs = "".join(f"\n  {a} is {b}" for a, b in sorted(shared.items())[:SHOWN])
        raise DataError(
            f"{len(shared)} training images have the same content as a val image:{pairs}\nResults on val would say "
            "nothing. Remove them, or set records.overlap to drop_train."
        )
    problems += [Problem("image_in_val", a, b) for a, b in sorted(shared.items())]
    return [r for r in train if r.image not in shared]


def _of(records: Iterable[Record], name: str) -> list[Record]:
    return [r for r in records if r.image.startswith(f"{name}/")]


def _names(name: str, declared: Sequence[Category], records: Iterable[Record]) -> tuple[str, ...]:
    """The names that a set annotates: the declared ones, or those that occur."""
    names = tuple(c.name for c in declared)
    return names or tuple(sorted({o.desc for r in _of(records, name) for o in r.objects}))


def _categories(by_set: Sequence[Sequence[Category]], splits: Mapping[str, list[Record]]) -> list[Category]:
    """Every name that val may hold, and whether training does. One set keeps its own ids, for its test server."""
    trained = {o.desc for r in splits["train"] for o in r.objects}
    declared = [c for categories in by_set for c in categories]
    found = {o.desc for r in splits["val"] for o in r.objects}
    if len(by_set) == 1 and found <= {c.name for c in declared}:
        return [replace(c, split="train" if c.name in trained else "held_out") for c in declared]
    names = sorted(found | {c.name for c in declared})
    return [Category(i, name, "train" if name in trained else "held_out") for i, name in enumerate(names, 1)]


def _prompted(records: Iterable[Record], plans: Mapping[str, PromptPlan], training: bool) -> list[Record]:
    return [with_prompt(r, plans[r.image.partition("/")[0]], training) for r in records]
