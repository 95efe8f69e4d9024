"""What is kept of a source: one place for every decision about boxes, names and images, whatever the format.

Nothing disappears silently: what is not kept becomes a `Problem` with its reason, file and id. The reasons are listed
in docs/data.md.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coordexp.config.profile import RecordsConfig
from coordexp.geometry.boxes import Box, as_boxes, reading_order
from coordexp.records.box_frames import BoxFrames
from coordexp.records.categories import Category
from coordexp.records.descriptions import clean_desc, desc_problem
from coordexp.records.images import ImageFacts, unsafe_name
from coordexp.records.schema import ObjectRecord, Record
from coordexp.records.sources.base import Problem, Reading, SourceImage, SourceObject, as_area_px2, is_finite

AREA_INVALID = "area_invalid"  # costs no object, only its annotated area


@dataclass(frozen=True, slots=True)
class RecordSet:
    """Records of one split of one set, everything that was not kept, and what the annotations looked like."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    bad_images: list[Problem] = field(default_factory=list)  # those of `problems` that cost a whole image
    categories: tuple[Category, ...] = ()  # those that the file declares
    annotated: Counter[tuple[int | None, str]] = field(default_factory=Counter)  # annotations by category id and name
    frames: BoxFrames = field(default_factory=BoxFrames)

    @property
    def drops(self) -> dict[str, int]:
        """What was not kept, counted by reason."""
        return dict(sorted(Counter(p.reason for p in self.problems).items()))


def to_records(
    reading: Reading,
    facts: Mapping[str, ImageFacts],
    config: RecordsConfig,
    split: str,
    *,
    prefix: str = "",
    prompt: str = "open",
    seed: int = 0,
) -> RecordSet:
    """Apply the policies to every image of a reading.

    Args:
        reading: what a reader found.
        facts: file name -> what is known of the file.
        config: what to do with the unusual.
        split: "train", or "val", where `max_objects` does not hold: what is evaluated is never thinned out.
        prefix: put before file names in records.
        prompt: what the set's prompts ask for. With "phrase" each record becomes a question about one object; those
            without any go.
        seed: of the choice of objects where there are too many.
    """
    result = RecordSet(categories=reading.categories)
    places: dict[str, int] = {}
    for image in reading.images:
        if problem := image_problem(image, facts):
            result.bad_images.append(problem)
            continue
        known = facts[image.file_name]
        kept = _kept_objects(image, known, config, result)
        if _asks_for_nothing(image, kept, prompt == "phrase"):
            if kept:
                result.problems.append(Problem("crowd", image.file, image.key, "the phrase means an ignore region"))
            elif not image.objects:
                result.problems.append(Problem("phrase_missing", image.file, image.key, "no object to ask for"))
            continue
        chosen = _at_most(kept, image, config, seed, result.problems) if split == "train" else kept
        if chosen is not None:
            record = _record(image, known, chosen, prefix)
            if not _joins(record, image, places, result):
                result.records.append(record)
    result.problems[:0] = reading.problems
    result.problems.extend(result.bad_images)
    return result


def _record(image: SourceImage, known: ImageFacts, objects: list[ObjectRecord], prefix: str) -> Record:
    order = reading_order(as_boxes([o.bbox_xyxy_px for o in objects]))
    metadata = dict(image.metadata)
    if image.image_id is not None:
        metadata = {"image_id": image.image_id, **metadata}
    ordered = tuple(objects[i] for i in order)
    return Record(f"{prefix}{image.file_name}", known.width, known.height, ordered, metadata=metadata)


def _joins(record: Record, image: SourceImage, places: dict[str, int], result: RecordSet) -> bool:
    """Whether the picture has a record already, which then holds these objects too: two would contradict each other.

    Only where the file tells pictures apart by ids; several questions about one picture stay apart.
    """
    if image.image_id is None or not image.metadata.keys().isdisjoint(("phrase", "prompt")):
        return False
    place = places.setdefault(record.image, len(result.records))
    if place == len(result.records):
        return False
    first = result.records[place]
    objects = list({(o.desc, o.bbox_xyxy_px): o for o in (*record.objects, *first.objects)}.values())
    order = reading_order(as_boxes([o.bbox_xyxy_px for o in objects]))
    result.records[place] = replace(first, objects=tuple(objects[i] for i in order))
    detail = f"{image.file_name}: joined to image {first.metadata['image_id']}"
    result.problems.append(Problem("picture_repeated", image.file, image.key, detail))
    return True


def image_problem(image: SourceImage, facts: Mapping[str, ImageFacts]) -> Problem | None:
    """Why an image cannot be used at all, or None."""
    if reason := unsafe_name(image.file_name):
        return Problem("image_path_unsafe", image.file, image.key, f"{image.file_name!r} {reason}")
    has_size = image.width is not None and image.height is not None
    if has_size and not (_is_side(image.width) and _is_side(image.height)):
        detail = f"{image.width!r} x {image.height!r} px"
        return Problem("image_size_invalid", image.file, image.key, detail)
    known = facts[image.file_name]
    if known.problem:
        return Problem(known.problem, image.file, image.key, f"{image.file_name}: {known.detail}")
    if has_size and (known.width, known.height) != (image.width, image.height):
        turned = known.orientation >= 5 and (known.height, known.width) == (image.width, image.height)
        reason = "image_exif_rotated" if turned else "image_size_differs"
        found = f"{image.file_name} is {known.width} x {known.height} px, annotated {image.width} x {image.height}"
        return Problem(reason, image.file, image.key, found)
    return None


def _is_side(value: Any) -> bool:
    return is_finite(value) and value >= 1 and float(value).is_integer()


def _kept_objects(
    image: SourceImage, known: ImageFacts, config: RecordsConfig, result: RecordSet
) -> list[ObjectRecord]:
    """The objects of an image that may be kept, each once; the others are added to the problems of `result`."""
    kept: dict[tuple[str, Box], ObjectRecord] = {}
    problems = result.problems
    for obj in image.objects:
        checked = _object(obj, known.width, known.height, config, result)
        if isinstance(checked, ObjectRecord) and (checked.desc, checked.bbox_xyxy_px) not in kept:
            kept[checked.desc, checked.bbox_xyxy_px] = checked
            if obj.area_px2 is not None and as_area_px2(obj.area_px2) is None:
                detail = f"{obj.area_px2!r:.40}"
                problems.append(Problem(AREA_INVALID, image.file, f"{image.key}, {obj.key}", detail))
        else:
            reason, detail = ("duplicate_object", "") if isinstance(checked, ObjectRecord) else checked
            problems.append(Problem(reason, image.file, f"{image.key}, {obj.key}", detail))
    return list(kept.values())


def _asks_for_nothing(image: SourceImage, kept: Iterable[ObjectRecord], asks_phrases: bool) -> bool:
    """Whether a phrase has lost its object: the question would be answered by "nothing is there".

    A source may say by a phrase without objects that it means nothing in the image; that stays.
    """
    had_object = "phrase" in image.metadata and bool(image.objects)
    is_question = had_object or (asks_phrases and not image.metadata.get("phrase"))
    return is_question and all(o.metadata.get("iscrowd") for o in kept)


def _object(
    obj: SourceObject, width: int, height: int, config: RecordsConfig, result: RecordSet
) -> ObjectRecord | tuple[str, str]:
    """The object as it may be kept, or the reason why not and what was found."""
    desc = clean_desc(obj.desc)
    if reason := desc_problem(desc):
        return reason, f"{desc!r:.60}"
    result.annotated[obj.category_id, str(desc)] += 1
    if obj.box_xyxy is None or not all(map(is_finite, obj.box_xyxy)):
        return "bbox_malformed", obj.found
    if obj.iscrowd is None:
        return "iscrowd_unknown", obj.found
    result.frames.add(obj, width, height, lambda: f"{obj.key}: {_shown_box(obj, width, height)}")
    if obj.iscrowd and config.crowd == "drop":
        return "crowd", ""
    if obj.truncated and config.truncated == "drop":
        return "truncated", ""
    found = obj.box_xyxy
    if obj.side_units is not None:
        x1, y1, x2, y2 = found
        by_x, by_y = width / obj.side_units, height / obj.side_units
        found = (x1 * by_x, y1 * by_y, x2 * by_x, y2 * by_y)
    box = _clip(found, width, height)
    if box[2] - box[0] < config.min_side_px or box[3] - box[1] < config.min_side_px:
        return "bbox_too_thin", _shown_box(obj, width, height)
    if _area(box) < config.min_inside * _area(found):
        return "bbox_outside", _shown_box(obj, width, height)
    is_region = obj.iscrowd and config.crowd == "ignore"
    metadata: dict[str, Any] = {**obj.metadata, **({"iscrowd": 1} if is_region else {})}
    if config.polygons == "keep" and obj.rings:
        metadata["segmentation"] = [[round(v, 2) for v in ring] for ring in obj.rings]
    # An area that is the box's says nothing more. Others stay where a box is clipped: a mask ends with the image.
    area_px2 = as_area_px2(obj.area_px2)
    return ObjectRecord(str(desc), box, None, metadata, None if area_px2 == _area(box) else area_px2)


def _shown_box(obj: SourceObject, width: int, height: int) -> str:
    """A box as a message quotes it: corners as the format reads them."""
    corners = ", ".join(f"{v:.4g}" for v in obj.box_xyxy or ())
    return (
        f"corners {corners}{'' if obj.side_units is None else f' of {obj.side_units:g}'}, image {width} x {height} px"
    )


def _clip(box: Box, width: int, height: int) -> Box:
    right, bottom = float(width), float(height)
    x1, y1, x2, y2 = box
    return min(max(x1, 0.0), right), min(max(y1, 0.0), bottom), min(max(x2, 0.0), right), min(max(y2, 0.0), bottom)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _at_most(
    objects: list[ObjectRecord], image: SourceImage, config: RecordsConfig, seed: int, problems: list[Problem]
) -> list[ObjectRecord] | None:
    """At most `max_objects` objects (ignore regions do not count), or None where the whole record goes."""
    counted = [o for o in objects if not o.metadata.get("iscrowd")]
    if not config.max_objects or len(counted) <= config.max_objects:
        return objects
    if config.over_max == "drop":
        problems.append(Problem("record_over_max_objects", image.file, image.key, f"{len(counted)} objects"))
        return None
    digest = hashlib.sha256(f"{seed}:{image.file_name}:{image.key}".encode()).digest()
    chosen = random.Random(digest).sample(counted, config.max_objects)
    lost = [o for o in counted if not any(o is c for c in chosen)]
    problems.extend(Problem("over_max_objects", image.file, image.key, o.desc) for o in lost)
    # Objects that are there but not asked for must not count as false alarms: they become ignore regions.
    regions = [replace(o, metadata={**o.metadata, "iscrowd": 1}) for o in lost]
    return [o for o in objects if o.metadata.get("iscrowd")] + chosen + regions
