"""What to keep of a source: all decisions about boxes, names and images, for all formats.

Nothing is dropped silently: every dropped item becomes a `Problem` with reason, file and id. docs/data.md lists the
reasons.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coordexp.config.profile import RecordsConfig
from coordexp.errors import DataError
from coordexp.geometry.boxes import Box, as_boxes, reading_order
from coordexp.infra.workers import map_batches
from coordexp.records.box_frames import BoxFrames
from coordexp.records.categories import Category
from coordexp.records.descriptions import MARKER, MAX_DESC_CHARS, clean_desc, desc_problem
from coordexp.records.images import ImageFacts, unsafe_name
from coordexp.records.schema import ObjectRecord, Record
from coordexp.records.sources.base import Problem, Reading, SourceImage, SourceObject, as_area_px2, is_finite
from coordexp.records.sources.files import shown
from coordexp.records.store import RecordStore

AREA_INVALID = "area_invalid"  # drops only the annotated area, not the object
INCOMPLETE = "record_incomplete"
UNNAMED = "object"  # name of the ignore region of an object without a usable name


@dataclass(slots=True)
class RecordSet:
    """Records of one split of one set, everything that was dropped, and statistics of the annotations."""

    records: RecordStore = field(default_factory=RecordStore)
    kept: int = 0  # annotations that are in the records unchanged
    problems: list[Problem] = field(default_factory=list)
    bad_images: list[Problem] = field(default_factory=list)  # those of `problems` that drop a whole image
    categories: tuple[Category, ...] = ()  # declared in the file
    annotated: Counter[tuple[int | None, str]] = field(default_factory=Counter)  # annotations by category id and name
    frames: BoxFrames = field(default_factory=BoxFrames)

    def add(self, other: RecordSet) -> None:
        """Add the results of more images."""
        self.records.extend(other.records)
        self.kept += other.kept
        self.problems += other.problems
        self.bad_images += other.bad_images
        self.annotated.update(other.annotated)
        self.frames.merge(other.frames)

    @property
    def drops(self) -> dict[str, int]:
        """Counts of dropped items by reason."""
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
    workers: int = 1,
) -> RecordSet:
    """Apply the policies to every image of a reading.

    Args:
        reading: the result of a reader.
        facts: file name -> facts of the file.
        config: the policies.
        split: "train" or "val"; `max_objects` does not apply to val, because evaluation data are never thinned out.
        prefix: prepended to file names in records.
        prompt: the kind of the set's prompts. With "phrase", each record is a prompt for one object, and records
            without an object are dropped.
        seed: seed of the choice of objects if there are too many.
        workers: number of processes; the result does not depend on it.

    Raises:
        DataError: the facts lack an annotated image, because files or annotations changed since the inspection.
    """

    def of_batch(entries: list[Any]) -> tuple[RecordSet, list[Problem]]:
        batch = replace(reading, entries=entries, problems=[])
        return _kept_images(batch, facts, config, split, prefix, prompt, seed), batch.problems

    result, unread = RecordSet(categories=reading.categories), list[Problem]()
    for found, not_images in map_batches(of_batch, reading.entries, workers):
        result.add(found)
        unread += not_images
    result.problems[:0] = [*reading.problems, *unread]
    result.problems.extend(result.bad_images)
    return result


def _kept_images(
    reading: Reading, facts: Mapping[str, ImageFacts], config: RecordsConfig, split: str, prefix: str, prompt: str,
    seed: int,
) -> RecordSet:  # fmt: skip
    result = RecordSet()
    for image in reading.images:
        if problem := image_problem(image, facts):
            result.bad_images.append(problem)
            continue
        if image.problem:
            result.problems.append(Problem(image.problem, image.file, image.key, image.detail))
            continue
        known = facts[image.file_name]
        kept, is_complete = _kept_objects(image, known, config, result)
        if _lost_its_object(image, kept, prompt == "phrase"):
            if any("lost" not in o.metadata for o in kept):
                result.problems.append(Problem("crowd", image.file, image.key, "the phrase means an ignore region"))
            elif not image.objects:
                result.problems.append(Problem("phrase_missing", image.file, image.key, "no object to ask for"))
            continue
        if not is_complete:
            detail = "it holds an object whose place is not known"
            result.problems.append(Problem(INCOMPLETE, image.file, image.key, detail))
            continue
        chosen = _at_most(kept, image, config, seed, result.problems) if split == "train" else kept
        if chosen is not None:
            result.records.append(_record(image, known, chosen, prefix))
            result.kept += sum("lost" not in o.metadata for o in chosen)
    return result


def _record(image: SourceImage, known: ImageFacts, objects: list[ObjectRecord], prefix: str) -> Record:
    order = reading_order(as_boxes([o.bbox_xyxy_px for o in objects]))
    metadata = dict(image.metadata)
    if image.image_id is not None:
        metadata = {"image_id": image.image_id, **metadata}
    ordered = tuple(objects[i] for i in order)
    return Record(f"{prefix}{image.file_name}", known.width, known.height, ordered, metadata=metadata)


def image_problem(image: SourceImage, facts: Mapping[str, ImageFacts]) -> Problem | None:
    """The problem that makes an image unusable, or None."""
    if reason := unsafe_name(image.file_name):
        return Problem("image_path_unsafe", image.file, image.key, f"{image.file_name!r} {reason}")
    has_size = image.width is not None and image.height is not None
    if has_size and not (_is_side(image.width) and _is_side(image.height)):
        detail = f"{image.width!r} x {image.height!r} px"
        return Problem("image_size_invalid", image.file, image.key, detail)
    try:
        known = facts[image.file_name]
    except KeyError as error:
        raise DataError(
            f"{image.file}: {image.key}: the image {image.file_name} was missing, or not annotated, when the raw stage "
            "inspected the images. In the graph: dvc repro --force --single-item raw, then dvc repro."
        ) from error
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


@dataclass(frozen=True, slots=True)
class Lost:
    """A dropped object: reason, what was found, and the ignore region that replaces it."""

    reason: str
    detail: str
    region: ObjectRecord | None = None
    leaves_gap: bool = False  # the object is in the image, but its position is unknown


def _kept_objects(
    image: SourceImage, known: ImageFacts, config: RecordsConfig, result: RecordSet
) -> tuple[list[ObjectRecord], bool]:
    """The kept objects of an image without duplicates, and whether the record is complete.

    Dropped objects are added to the problems of `result`. If its position is known, a dropped object leaves an ignore
    region; otherwise training would teach that nothing is there.
    """
    kept: dict[tuple[str, Box], ObjectRecord] = {}
    regions: list[ObjectRecord] = []
    problems, is_complete = result.problems, True
    for obj in image.objects:
        key = f"{image.key}, {obj.key}"
        checked = _object(obj, known.width, known.height, config, result)
        if isinstance(checked, Lost):
            problems.append(Problem(checked.reason, image.file, key, checked.detail))
            regions += [checked.region] if checked.region else []
            is_complete = is_complete and not checked.leaves_gap
        elif (checked.desc, checked.bbox_xyxy_px) in kept:
            problems.append(Problem("duplicate_object", image.file, key, ""))
        else:
            kept[checked.desc, checked.bbox_xyxy_px] = checked
            if obj.area_px2 is not None and as_area_px2(obj.area_px2) is None:
                problems.append(Problem(AREA_INVALID, image.file, key, shown(obj.area_px2)))
    for region in regions:
        kept.setdefault((region.desc, region.bbox_xyxy_px), region)
    return list(kept.values()), is_complete


def _lost_its_object(image: SourceImage, kept: Iterable[ObjectRecord], asks_phrases: bool) -> bool:
    """Whether a phrase has lost its object, so that the target answer would be empty.

    A source may state by a phrase without objects that the phrase matches nothing in the image; such a record stays.
    """
    had_object = "phrase" in image.metadata and bool(image.objects)
    is_question = had_object or (asks_phrases and not image.metadata.get("phrase"))
    return is_question and all(o.metadata.get("iscrowd") for o in kept)


def _object(
    obj: SourceObject, width: int, height: int, config: RecordsConfig, result: RecordSet
) -> ObjectRecord | Lost:
    """The object in record form, or the loss if it must be dropped."""
    desc = clean_desc(obj.desc)
    reason, detail = _problem_of_content(obj, desc)
    name = str(desc) if not desc_problem(desc) else _region_name(desc)
    result.annotated[obj.category_id, name] += 1
    if obj.box_xyxy is None or not all(map(is_finite, obj.box_xyxy)):
        return Lost(reason or "bbox_malformed", detail or obj.found, leaves_gap=True)
    result.frames.add(obj, width, height, lambda: f"{obj.key}: {_shown_box(obj, width, height)}")
    if not reason and obj.iscrowd and config.crowd == "drop":
        return Lost("crowd", "")
    found = _in_pixels(obj.box_xyxy, obj.side_units, width, height)
    box = _clip(found, width, height)
    if not reason and (reason := _problem_of_box(obj, found, box, config)):
        detail = "" if reason == "truncated" else _shown_box(obj, width, height)
    if reason:
        place = _place(found, width, height, config.min_side_px)
        region = ObjectRecord(name, place, metadata={"iscrowd": 1, "lost": reason}) if place else None
        return Lost(reason, detail, region)  # a box outside the image leaves no gap
    is_region = obj.iscrowd and config.crowd == "ignore"
    metadata: dict[str, Any] = {**obj.metadata, **({"iscrowd": 1} if is_region else {})}
    if config.polygons == "keep" and obj.rings:
        metadata["segmentation"] = [[round(v, 2) for v in ring] for ring in obj.rings]
    # An area equal to that of the box is redundant. Others stay even if the box is clipped: masks end at the border.
    area_px2 = as_area_px2(obj.area_px2)
    return ObjectRecord(name, box, None, metadata, None if area_px2 == _area(box) else area_px2)


def _problem_of_content(obj: SourceObject, desc: object) -> tuple[str, str]:
    """The drop reason that does not depend on the box, and what was found; both empty if there is none."""
    if obj.problem:
        return obj.problem, obj.found
    if reason := desc_problem(desc):
        return reason, shown(desc, 60)
    return ("iscrowd_unknown", obj.found) if obj.iscrowd is None and obj.box_xyxy is not None else ("", "")


def _problem_of_box(obj: SourceObject, found: Box, clipped: Box, config: RecordsConfig) -> str:
    if obj.truncated and config.truncated == "drop":
        return "truncated"
    if clipped[2] - clipped[0] < config.min_side_px or clipped[3] - clipped[1] < config.min_side_px:
        return "bbox_too_thin"
    return "bbox_outside" if _area(clipped) < config.min_inside * _area(found) else ""


def _in_pixels(box: Box, side_units: float | None, width: int, height: int) -> Box:
    if side_units is None:
        return box
    x1, y1, x2, y2 = box
    if side_units == 1:
        return x1 * width, y1 * height, x2 * width, y2 * height
    return x1 * width / side_units, y1 * height / side_units, x2 * width / side_units, y2 * height / side_units


def _region_name(desc: object) -> str:
    """The name of the ignore region of a dropped object: its name, or the valid part of it."""
    if not isinstance(desc, str):
        return UNNAMED
    plain = str(clean_desc("".join(c for c in MARKER.sub(" ", desc) if c.isprintable())))[:MAX_DESC_CHARS].strip()
    return UNNAMED if desc_problem(plain) else plain


def _place(box: Box, width: int, height: int, min_side_px: float) -> Box | None:
    """The region of the image that a box with an invalid size refers to; None if it is outside."""
    x1, x2 = sorted((box[0], box[2]))
    y1, y2 = sorted((box[1], box[3]))
    if x1 > width or y1 > height or x2 < 0 or y2 < 0:
        return None
    x1, y1, x2, y2 = _clip((x1, y1, x2, y2), width, height)
    left, right = _widened(x1, x2, width, min_side_px)
    top, bottom = _widened(y1, y2, height, min_side_px)
    return left, top, right, bottom


def _widened(begin: float, end: float, side: int, at_least: float) -> tuple[float, float]:
    """An interval on a side, widened around its center to at least this length, within the side."""
    length = min(max(end - begin, at_least), float(side))
    begin = min(max((begin + end - length) / 2, 0.0), side - length)
    return begin, begin + length


def _shown_box(obj: SourceObject, width: int, height: int) -> str:
    """Quote a box for messages: corners as read by the format."""
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
    """At most `max_objects` objects (ignore regions do not count), or None if the whole record is dropped."""
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
    # Detecting one of the removed objects must not count as a false positive: they become ignore regions.
    regions = [replace(o, metadata={**o.metadata, "iscrowd": 1}) for o in lost]
    return [o for o in objects if o.metadata.get("iscrowd")] + chosen + regions
