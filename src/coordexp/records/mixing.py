"""Turn the records of data sets into the splits of a profile: dev, weights, unique ids, views, prompts.

Every random choice is derived from a hash of the record and the seed, so the choice for one record does not depend on
other records.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordexp.config.profile import RecordsConfig
from coordexp.errors import ConfigError, DataError
from coordexp.records.augment import augment
from coordexp.records.schema import Record
from coordexp.records.store import RecordStore

# A longer list would take more tokens than the image.
MAX_CLOSED_NAMES = 200


def split_dev(
    records: Iterable[Record], dev_images: int, content: Mapping[str, str]
) -> tuple[RecordStore, RecordStore]:
    """(train, dev): the `dev_images` images with the smallest name hashes become dev, with all their records.

    The choice depends on each image alone, so adding images to the source moves few others between splits.

    Args:
        records: the training records; one image may have several.
        dev_images: number of images to select.
        content: image -> hash of its file. An image with two names stays in one split, chosen by the first name.
    """
    stored = records if isinstance(records, RecordStore) else RecordStore(records)
    names = list(stored.images())
    order = sorted(range(len(names)), key=names.__getitem__)
    name_of: dict[str, str] = {}
    for i in order:
        name_of.setdefault(content[names[i]], names[i])
    ranked = sorted(name_of, key=lambda c: hashlib.sha256(name_of[c].encode()).digest())
    if dev_images >= len(ranked):
        raise DataError(
            f"records.dev_images is {dev_images}, but there are {len(ranked)} training images; leave some for training."
        )
    dev = set(ranked[:dev_images])
    return (
        stored.taken(i for i in order if content[names[i]] not in dev),
        stored.taken(i for i in order if content[names[i]] in dev),
    )


def without_some(records: RecordStore, fraction: float, seed: int) -> tuple[RecordStore, RecordStore]:
    """(kept, removed): records without a random fraction of their objects, and records of only the removed objects.

    This simulates missing annotations. Each object is chosen independently; ignore regions stay. Both results keep the
    ids of the records.
    """
    if not fraction:
        return records, RecordStore()
    kept, lost = RecordStore(), RecordStore()
    for record in records:
        rng = _choice(record, seed, "missing")
        gone = [rng.random() < fraction and not o.metadata.get("iscrowd") for o in record.objects]
        kept.append(replace(record, objects=tuple(o for o, g in zip(record.objects, gone, strict=True) if not g)))
        if any(gone):
            lost.append(replace(record, objects=tuple(o for o, g in zip(record.objects, gone, strict=True) if g)))
    return kept, lost


def overlap(train: Iterable[str], val: Iterable[str], content: Mapping[str, str]) -> dict[str, str]:
    """Training image -> val image with the same content, for all such images."""
    of_val = {content[image]: image for image in val}
    return {image: of_val[content[image]] for image in train if content[image] in of_val}


def repeat_by_weight(records: Iterable[Record], weight: float, seed: int) -> Iterator[Record]:
    """Yield each record floor(weight) times, and once more with the probability of the remaining fraction.

    Copies are numbered and have separate image ids: each gets its own prompt and view, and so its own rollout.
    """
    whole, fraction = divmod(weight, 1)
    for record in records:
        times = int(whole) + (_choice(record, seed, "weight").random() < fraction)
        for i in range(times):
            yield _with(record, repeat=i, image_id=_hashed_id(f"{record.metadata['image_id']}#{i}")) if i else record


def with_views(records: Iterable[Record], config: RecordsConfig, seed: int) -> Iterable[Record]:
    """A random view of each record (`flip`, `crop`, `scale_jitter`)."""
    if not (config.flip or config.crop or config.scale_jitter):
        return records
    return (augment(record, config, _choice(record, seed, "view")) for record in records)


def with_unique_ids(records: RecordStore, keep: bool) -> RecordStore:
    """Records with unique `image_id`s: those of the source if `keep`, otherwise 48-bit hashes of the image names."""
    if keep and all("image_id" in metadata for _, metadata in records.heads()):
        return records
    return RecordStore(_with_hashed_ids(records))


def _with_hashed_ids(records: Iterable[Record]) -> Iterator[Record]:
    seen: Counter[str] = Counter()
    for record in records:
        name = f"{record.image}#{record.metadata.get('phrase', '')}"
        number = _hashed_id(f"{name}#{seen[name]}")
        seen[name] += 1
        metadata = dict(record.metadata)
        if "image_id" in metadata:
            metadata["source_image_id"] = metadata.pop("image_id")
        yield replace(record, metadata={"image_id": number, **metadata})


def _hashed_id(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


@dataclass(frozen=True, slots=True)
class SetNames:
    """The category names of a data set: all, those in training, and an index by word."""

    every: tuple[str, ...]
    trained: tuple[str, ...]
    by_word: Mapping[str, frozenset[str]]
    readable: tuple[str, ...]  # names in `every` whose words all occur in `trained`

    @classmethod
    def of(cls, every: Iterable[str], trained: Iterable[str]) -> SetNames:
        """Index the names by their words."""
        every, trained = tuple(every), tuple(trained)
        by_word: defaultdict[str, set[str]] = defaultdict(set)
        for name in every:
            for word in name.split():
                by_word[word].add(name)
        known = {word for name in trained for word in name.split()}
        readable = tuple(name for name in every if known.issuperset(name.split()))
        return cls(every, trained, {word: frozenset(names) for word, names in by_word.items()}, readable)

    def sharing(self, present: Iterable[str]) -> frozenset[str]:
        """Names that share a word with one of these: hard negatives."""
        words = {word for name in present for word in name.split()}
        return frozenset().union(*(self.by_word.get(word, ()) for word in words))


def with_prompt(record: Record, kind: str, names: SetNames, config: RecordsConfig, seed: int, training: bool) -> Record:
    """The record with `metadata.prompt`, which `text.prompts` turns into text.

    Training prompts have one of the first `wordings`. A listed one contains a fraction `listed_present` of the present
    names, and up to `listed_names` in total; the others are sampled from names known to be absent. With probability
    `negative_rate` it contains only absent names. Dev and val always use the first wording, and list all names that
    evaluation may count: the complete list or, if that is too long, the names that annotators searched for in the
    image. If no name is known to be absent, the prompt is open. In a mixed set, dev and val prompts are open.

    Args:
        record: the record.
        kind: the kind of prompts of its set: open, closed, listed, phrase or mixed.
        names: the category names of the set.
        config: the policies.
        seed: seed of the random choices.
        training: whether the record is in the training split.
    """
    rng = _choice(record, seed, "prompt")
    style = rng.randrange(config.wordings) if training else 0
    if kind == "mixed":
        kind, asked = _mixed(record, names, config, rng) if training else ("open", [])
    else:
        asked = _asked_names(record, kind, names, config, rng, training)
    kind = kind if asked else "open"
    prompt: dict[str, Any] = {"kind": kind, "style": style} | ({"names": asked} if kind != "open" else {})
    if prompt == {"kind": "open", "style": 0}:
        return record
    return _with(record, prompt=prompt)


def _asked_names(
    record: Record, kind: str, names: SetNames, config: RecordsConfig, rng: random.Random, training: bool
) -> list[str]:
    """The names in the prompt, for a set with one kind of prompts."""
    if kind == "phrase":
        there = (o.desc for o in record.objects if not o.metadata.get("iscrowd"))
        return [record.metadata.get("phrase") or next(there, "")]
    if kind == "closed":
        return _closed(names.every)
    if kind == "open":
        return []
    present, absent = _present_and_absent(record, names.trained if training else names.every)
    if training:
        return _listed(present, absent, names, config, rng)
    if len(names.every) <= MAX_CLOSED_NAMES and "absent" not in record.metadata:
        return sorted(names.every)
    return sorted({*present, *absent}) if absent else []


def _mixed(record: Record, names: SetNames, config: RecordsConfig, rng: random.Random) -> tuple[str, list[str]]:
    """The kind of a training prompt in a mixed set, and its names."""
    at = rng.random()
    if at >= config.mixed_listed + config.mixed_phrase:
        return "open", []
    present, absent = _present_and_absent(record, names.trained)
    if at < config.mixed_listed:
        return "listed", _listed(present, absent, names, config, rng)
    if rng.random() < config.negative_rate:
        return "phrase", _absent_names(1, present, absent, names, config, rng)
    return ("phrase", [rng.choice(present)]) if present else ("open", [])


# Kinds of probes: a list of present and absent names ("list"), one present name ("one"), absent names that share no
# word with a present one ("easy"), and absent names that do ("hard").
PROBES = ("list", "one", "easy", "hard")


def probes(record: Record, names: SetNames, config: RecordsConfig, seed: int) -> list[Record]:
    """Additional prompts for the image of a val record, each as a separate record; kinds without names are skipped.

    Absent names are taken from the readable names, whose words all occur in training.
    """
    present, absent = _present_and_absent(record, names.readable)
    similar = names.sharing(present)
    found = []
    for probe in PROBES:
        rng = _choice(record, seed, f"probe/{probe}")
        asked: list[str] = []
        if probe == "list" and present:
            asked = _listed(present, absent, names, config.model_copy(update={"negative_rate": 0.0}), rng)
        elif probe == "one" and present:
            asked = [rng.choice(present)]
        elif probe in ("easy", "hard"):
            pool = [name for name in absent if (name in similar) == (probe == "hard")]
            asked = rng.sample(pool, rng.randint(1, min(len(pool), config.listed_names))) if pool else []
        if asked:
            prompt = {"kind": "phrase" if probe == "one" else "listed", "style": 0, "names": asked}
            number = _hashed_id(f"{record.metadata['image_id']}#{probe}")
            found.append(_with(record, image_id=number, prompt=prompt, probe=probe))
    return found


def _closed(names: Sequence[str]) -> list[str]:
    if not names or len(names) > MAX_CLOSED_NAMES:
        raise ConfigError(
            f"source.sets.<name>.prompt: closed, but the set has {len(names)} names; expected 1 to "
            f"{MAX_CLOSED_NAMES}. Use listed (present and absent names) or open."
        )
    return list(names)


def _present_and_absent(record: Record, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(present, absent) names, as far as known. Names of crowd regions or difficult objects are in neither.

    A name that is contained in the name of an object is not absent: with a red cat in the image, "cat" is not absent.
    """
    annotated = {o.desc for o in record.objects}
    present = sorted({o.desc for o in record.objects if not o.metadata.get("iscrowd")})
    known_absent = set(record.metadata.get("absent", names))
    words = [set(name.split()) for name in annotated]
    implied = {part for of_name in words for part in of_name} & known_absent
    excluded = annotated | implied | set(record.metadata.get("not_exhaustive", ()))
    return present, sorted(known_absent - excluded)


def _listed(
    present: list[str], absent: list[str], names: SetNames, config: RecordsConfig, rng: random.Random
) -> list[str]:
    """The names of a listed prompt: some present ones, unless it is a negative prompt, and some absent ones."""
    asked: list[str] = []
    if present and not (absent and rng.random() < config.negative_rate):
        asked = [name for name in present if rng.random() < config.listed_present] or [rng.choice(present)]
        asked = rng.sample(asked, min(len(asked), config.listed_names))
    room = min(len(absent), config.listed_names - len(asked))
    asked += _absent_names(rng.randint(0 if asked else min(1, room), room), present, absent, names, config, rng)
    rng.shuffle(asked)
    return asked


def _absent_names(
    count: int, present: list[str], absent: list[str], names: SetNames, config: RecordsConfig, rng: random.Random
) -> list[str]:
    """`count` absent names; a fraction `listed_hard` of them share a word with a present name, if there are enough."""
    similar = sorted(names.sharing(present).intersection(absent)) if config.listed_hard else []
    n_similar = min(len(similar), sum(rng.random() < config.listed_hard for _ in range(count)))
    asked = rng.sample(similar, n_similar)
    taken = set(asked)
    others = [name for name in absent if name not in taken]
    return asked + rng.sample(others, min(len(others), count - n_similar))


def _choice(record: Record, seed: int, purpose: str) -> random.Random:
    key = f"{seed}:{purpose}:{record.image}:{record.metadata.get('phrase', '')}:{record.metadata.get('repeat', 0)}"
    return random.Random(hashlib.sha256(key.encode()).digest())


def _with(record: Record, **metadata: Any) -> Record:
    return replace(record, metadata={**record.metadata, **metadata})
