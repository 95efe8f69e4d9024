"""Several data sets as one: weights, image ids that do not clash, and what each prompt asks for.

Every choice is made by a hash of the record and the seed, so that one record's choice does not depend on the others.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordexp.errors import ConfigError
from coordexp.records.augment import Augmentation, augment
from coordexp.records.schema import Record

# A longer list costs more tokens than the picture.
MAX_CLOSED_NAMES = 200
PARAPHRASES = 4  # text.prompts has at least so many wordings of each kind


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """How the training prompts of one set are chosen (`source.sets.<name>.prompt` and the `records` block)."""

    kind: str  # open, closed, listed, phrase
    names: tuple[str, ...]  # every name that the set annotates
    listed_names: int
    negative_rate: float
    seed: int


def repeat_by_weight(records: Iterable[Record], weight: float, seed: int) -> list[Record]:
    """Each record floor(weight) times, and the share given by the fraction once more.

    Copies are numbered and have image ids of their own: each gets its own prompt and view, so its own rollout.
    """
    whole, fraction = divmod(weight, 1)
    out = []
    for record in records:
        times = int(whole) + (_choice(record, seed, "weight").random() < fraction)
        out += [
            _with(record, repeat=i, image_id=_hashed_id(f"{record.metadata['image_id']}#{i}")) if i else record
            for i in range(times)
        ]
    return out


def with_views(records: Iterable[Record], how: Augmentation, seed: int) -> list[Record]:
    """A random view of each record."""
    return [augment(record, how, _choice(record, seed, "view")) for record in records]


def with_unique_ids(records: Sequence[Record], keep: bool) -> list[Record]:
    """Records whose `image_id` is unique: the source's own if `keep`, else 48 bits of a hash of the record's name."""
    if keep and all("image_id" in r.metadata for r in records):
        return list(records)
    seen: Counter[str] = Counter()
    out = []
    for record in records:
        name = f"{record.image}#{record.metadata.get('phrase', '')}"
        number = _hashed_id(f"{name}#{seen[name]}")
        seen[name] += 1
        metadata = dict(record.metadata)
        if "image_id" in metadata:
            metadata["source_image_id"] = metadata.pop("image_id")
        out.append(replace(record, metadata={"image_id": number, **metadata}))
    return out


def _hashed_id(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def with_prompt(record: Record, plan: PromptPlan, training: bool) -> Record:
    """The record with `metadata.prompt`, which `text.prompts` puts into words.

    Training prompts are paraphrased; a listed one names what is there and up to `listed_names` in all, the others drawn
    from what is known to be absent, and in `negative_rate` of the cases nothing that is there. Dev and val always use
    the first wording, and name everything that may be judged: the whole list, or, where that is too long, the names
    that the image was searched for; they are open where nothing is known to be absent.
    """
    rng = _choice(record, plan.seed, "prompt")
    style = rng.randrange(PARAPHRASES) if training else 0
    prompt: dict[str, Any] = {"kind": plan.kind, "style": style}
    if plan.kind == "phrase":
        there = (o.desc for o in record.objects if not o.metadata.get("iscrowd"))
        prompt["names"] = [record.metadata.get("phrase") or next(there, "")]
    elif plan.kind == "closed":
        prompt["names"] = list(_closed(plan))
    elif plan.kind == "listed":
        present, absent = _present_and_absent(record, plan)
        if training:
            prompt["names"] = _listed(present, absent, plan, rng)
        elif len(plan.names) <= MAX_CLOSED_NAMES and "absent" not in record.metadata:
            prompt["names"] = sorted(plan.names)
        else:
            prompt["names"] = sorted({*present, *absent}) if absent else []
        if not prompt["names"]:
            prompt = {"kind": "open", "style": style}
    if prompt == {"kind": "open", "style": 0}:
        return record
    return _with(record, prompt=prompt)


def _closed(plan: PromptPlan) -> tuple[str, ...]:
    if not plan.names or len(plan.names) > MAX_CLOSED_NAMES:
        raise ConfigError(
            f"source.sets.<name>.prompt: closed, but the set has {len(plan.names)} names; expected 1 to "
            f"{MAX_CLOSED_NAMES}. Use listed (present and absent names) or open."
        )
    return plan.names


def _present_and_absent(record: Record, plan: PromptPlan) -> tuple[list[str], list[str]]:
    """Names that are there, and names known not to be. A crowd's or difficult object's name is neither."""
    annotated = {o.desc for o in record.objects}
    present = sorted({o.desc for o in record.objects if not o.metadata.get("iscrowd")})
    known_absent = record.metadata.get("absent", plan.names)
    excluded = annotated | set(record.metadata.get("not_exhaustive", ()))
    return present, sorted(set(known_absent) - excluded)


def _listed(present: list[str], absent: list[str], plan: PromptPlan, rng: random.Random) -> list[str]:
    if absent and (not present or rng.random() < plan.negative_rate):
        asked = rng.sample(absent, rng.randint(1, min(len(absent), plan.listed_names)))
    else:
        asked = rng.sample(present, min(len(present), plan.listed_names))
        room = min(len(absent), plan.listed_names - len(asked))
        asked += rng.sample(absent, rng.randint(0, room))
    rng.shuffle(asked)
    return asked


def _choice(record: Record, seed: int, purpose: str) -> random.Random:
    key = f"{seed}:{purpose}:{record.image}:{record.metadata.get('phrase', '')}:{record.metadata.get('repeat', 0)}"
    return random.Random(hashlib.sha256(key.encode()).digest())


def _with(record: Record, **metadata: Any) -> Record:
    return replace(record, metadata={**record.metadata, **metadata})
