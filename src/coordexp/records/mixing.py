"""From the records of data sets to the splits of a profile: dev, weights, ids that do not clash, views, prompts.

Every choice is made by a hash of the record and the seed, so that one record's choice does not depend on the others.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from coordexp.config.profile import RecordsConfig
from coordexp.errors import ConfigError, DataError
from coordexp.records.augment import augment
from coordexp.records.schema import Record
from coordexp.records.store import RecordStore

# A longer list costs more tokens than the picture.
MAX_CLOSED_NAMES = 200


def split_dev(
    records: Iterable[Record], dev_images: int, content: Mapping[str, str]
) -> tuple[RecordStore, RecordStore]:
    """(train, dev): the `dev_images` pictures whose name has the smallest hash become dev, with all their records.

    The choice depends on each picture alone: adding some to the source moves few others between splits.

    Args:
        records: the training records; one image may have several.
        dev_images: how many pictures to take.
        content: image -> hash of its file. One picture under two names stays in one split, chosen by the first name.
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
            f"records.dev_images is {dev_images} of {len(ranked)} training images; leave some for training."
        )
    dev = set(ranked[:dev_images])
    return (
        stored.taken(i for i in order if content[names[i]] not in dev),
        stored.taken(i for i in order if content[names[i]] in dev),
    )


def overlap(train: Iterable[str], val: Iterable[str], content: Mapping[str, str]) -> dict[str, str]:
    """Training image -> the val image with the same content, for every one there is."""
    of_val = {content[image]: image for image in val}
    return {image: of_val[content[image]] for image in train if content[image] in of_val}


def repeat_by_weight(records: Iterable[Record], weight: float, seed: int) -> Iterator[Record]:
    """Each record floor(weight) times, and, for the fraction that is left, some of them once more.

    Copies are numbered and have image ids of their own: each gets its own prompt and view, so its own rollout.
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
    """Records whose `image_id` is unique: the source's own if `keep`, else 48 bits of a hash of the record's name."""
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


def with_prompt(
    record: Record, kind: str, names: Sequence[str], config: RecordsConfig, seed: int, training: bool
) -> Record:
    """The record with `metadata.prompt`, which `text.prompts` puts into words.

    Training prompts have one of the first `wordings`; a listed one names what is there and up to `listed_names` in all,
    the others drawn from what is known to be absent, and in `negative_rate` of the cases nothing that is there. Dev and
    val always use the first wording, and name everything that may be judged: the whole list, or, where that is too
    long, the names that the image was searched for; they are open where nothing is known to be absent.

    Args:
        record: the record.
        kind: what the prompts of its set ask for: open, closed, listed or phrase.
        names: every name that the set annotates.
        config: the policies.
        seed: of the choices.
        training: whether the record is trained on.
    """
    rng = _choice(record, seed, "prompt")
    style = rng.randrange(config.wordings) if training else 0
    prompt: dict[str, Any] = {"kind": kind, "style": style}
    if kind == "phrase":
        there = (o.desc for o in record.objects if not o.metadata.get("iscrowd"))
        prompt["names"] = [record.metadata.get("phrase") or next(there, "")]
    elif kind == "closed":
        prompt["names"] = _closed(names)
    elif kind == "listed":
        present, absent = _present_and_absent(record, names)
        if training:
            prompt["names"] = _listed(present, absent, config, rng)
        elif len(names) <= MAX_CLOSED_NAMES and "absent" not in record.metadata:
            prompt["names"] = sorted(names)
        else:
            prompt["names"] = sorted({*present, *absent}) if absent else []
        if not prompt["names"]:
            prompt = {"kind": "open", "style": style}
    if prompt == {"kind": "open", "style": 0}:
        return record
    return _with(record, prompt=prompt)


def _closed(names: Sequence[str]) -> list[str]:
    if not names or len(names) > MAX_CLOSED_NAMES:
        raise ConfigError(
            f"source.sets.<name>.prompt: closed, but the set has {len(names)} names; expected 1 to "
            f"{MAX_CLOSED_NAMES}. Use listed (present and absent names) or open."
        )
    return list(names)


def _present_and_absent(record: Record, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names that are there, and names known not to be. A crowd's or difficult object's name is neither."""
    annotated = {o.desc for o in record.objects}
    present = sorted({o.desc for o in record.objects if not o.metadata.get("iscrowd")})
    known_absent = record.metadata.get("absent", names)
    excluded = annotated | set(record.metadata.get("not_exhaustive", ()))
    return present, sorted(set(known_absent) - excluded)


def _listed(present: list[str], absent: list[str], config: RecordsConfig, rng: random.Random) -> list[str]:
    if absent and (not present or rng.random() < config.negative_rate):
        asked = rng.sample(absent, rng.randint(1, min(len(absent), config.listed_names)))
    else:
        asked = rng.sample(present, min(len(present), config.listed_names))
        room = min(len(absent), config.listed_names - len(asked))
        asked += rng.sample(absent, rng.randint(0, room))
    rng.shuffle(asked)
    return asked


def _choice(record: Record, seed: int, purpose: str) -> random.Random:
    key = f"{seed}:{purpose}:{record.image}:{record.metadata.get('phrase', '')}:{record.metadata.get('repeat', 0)}"
    return random.Random(hashlib.sha256(key.encode()).digest())


def _with(record: Record, **metadata: Any) -> Record:
    return replace(record, metadata={**record.metadata, **metadata})
