"""Join records of the same image (under two names, two ids or in two sets) if their annotations are compatible.

With two separate records of one image, training and evaluation would treat the objects of the other record as absent.
Equal images are recognized by the content of their files.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from coordexp.geometry.boxes import as_boxes, pairwise_iou, reading_order
from coordexp.records.schema import ObjectRecord, Record
from coordexp.records.sources.base import Problem
from coordexp.records.store import RecordStore

Policy = Literal["merge", "first", "file", "keep"]
SAME_IOU = 0.9  # above it, two boxes are the same object
OTHER_IOU = 0.5  # below it, they are different objects; in between, one object was probably annotated twice
MAX_DOUBTFUL = 0.2  # maximum fraction of doubtful objects, relative to the smaller record
_QUESTIONS = ("phrase", "prompt", "repeat")  # keys of records of which one image intentionally has several


@dataclass(frozen=True, slots=True)
class Joined:
    """Records without duplicate images, the joined records as problems, and contradictions in words."""

    records: RecordStore
    problems: list[Problem] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def join_same_pictures(records: RecordStore, content: Mapping[str, str], policy: Policy) -> Joined:
    """Join the records of each image of a split at the position of the first one.

    Args:
        records: records of all sets, with unified names. Records with prompts of their own stay separate.
        content: image -> hash of its file.
        policy: `merge` joins compatible records, `first` keeps only the first record, `file` joins records with the
            same file name regardless of content, `keep` keeps all.
    """
    if policy == "keep":
        return Joined(records)
    if policy == "file":
        content = {image: image for image in records.images()}
    counts = Counter(content[image] for image, metadata in records.heads() if metadata.keys().isdisjoint(_QUESTIONS))
    repeated = {c for c, n in counts.items() if n > 1 and c}
    if not repeated:
        return Joined(records)
    twins: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if _is_whole(record) and content[record.image] in repeated:
            twins[content[record.image]].append(record)
    result = Joined(RecordStore())
    joined = {c: _join(group, policy, result) for c, group in twins.items()}
    kept = RecordStore()
    for record in records:
        found = content[record.image] if _is_whole(record) else ""
        if found not in repeated:
            kept.append(record)
        elif found in joined:  # the first record of its image
            kept.append(joined.pop(found))
    return replace(result, records=kept)


def _is_whole(record: Record) -> bool:
    return record.metadata.keys().isdisjoint(_QUESTIONS)


def _join(group: list[Record], policy: Policy, result: Joined) -> Record:
    first = group[0]
    for other in group[1:]:
        detail = f"the content of {first.image}" + (_number(first) if other.image == first.image else "")
        if policy == "first":
            result.problems.append(Problem("picture_left_out", other.image, _key(other), f"has {detail}"))
            continue
        added, doubts = _added(first.objects, other.objects)
        smaller = min(len(first.objects), len(other.objects))
        if len(doubts) > MAX_DOUBTFUL * smaller:
            result.conflicts.append(f"{other.image}{_number(other)} has {detail}, but {doubts[0]}")
            continue
        result.problems.append(Problem("picture_repeated", other.image, _key(other), f"has {detail}; joined to it"))
        first = _with_objects(first, [*first.objects, *added])
    return first


def _number(record: Record) -> str:
    return f" (image {record.metadata['image_id']})" if "image_id" in record.metadata else ""


def _key(record: Record) -> str:
    return f"image {record.metadata['image_id']}" if "image_id" in record.metadata else "image"


def _added(known: Sequence[ObjectRecord], others: Sequence[ObjectRecord]) -> tuple[list[ObjectRecord], list[str]]:
    """The new objects of another record and, in words, those that are hardly compatible with the same image."""
    added: list[ObjectRecord] = []
    doubts: list[str] = []
    if not known:
        return list(others), doubts
    if not others:
        return added, doubts
    ious = pairwise_iou(as_boxes([o.bbox_xyxy_px for o in others]), as_boxes([o.bbox_xyxy_px for o in known]))
    descs = np.array([o.desc for o in known])
    for obj, row in zip(others, ious, strict=True):
        same = row[descs == obj.desc].max(initial=0.0)
        if same >= SAME_IOU:
            continue
        added.append(obj)
        nearest = known[int(row.argmax())]
        if same > OTHER_IOU:
            doubts.append(f"{obj.desc!r} has boxes of IoU {same:.2f}")
        elif row.max() >= SAME_IOU and not (_is_region(obj) or _is_region(nearest)):
            doubts.append(f"one box is called {nearest.desc!r} and {obj.desc!r}")
    return added, doubts


def _is_region(obj: ObjectRecord) -> bool:
    return bool(obj.metadata.get("iscrowd"))


def _with_objects(record: Record, objects: list[ObjectRecord]) -> Record:
    order = reading_order(as_boxes([o.bbox_xyxy_px for o in objects]))
    metadata = dict(record.metadata)
    if "absent" in metadata:
        there = {o.desc for o in objects}
        metadata["absent"] = [name for name in metadata["absent"] if name not in there]
    return replace(record, objects=tuple(objects[i] for i in order), metadata=metadata)
