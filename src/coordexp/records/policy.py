"""What is kept of a source: one place for every decision about boxes, names and images, whatever the format.

Nothing disappears silently: what is not kept becomes a `Problem` with its reason, file and id. The reasons are listed
in docs/data.md.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from coordexp.errors import DataError
from coordexp.geometry.boxes import as_boxes, reading_order
from coordexp.records.categories import Category
from coordexp.records.descriptions import clean_desc, desc_problem
from coordexp.records.images import ImageFacts, unsafe_name
from coordexp.records.schema import ObjectRecord, Record
from coordexp.records.sources.base import Box, Problem, Reading, SourceImage, SourceObject, as_area_px2, is_finite

SHOWN = 5  # examples in an error
AREA_INVALID = "area_invalid"  # the one reason that costs no object, only its annotated area


@dataclass(frozen=True, slots=True)
class Policies:
    """What happens to the unusual; the fields are those of the `records` block (docs/parameters.md)."""

    crowd: Literal["ignore", "drop"] = "ignore"
    truncated: Literal["keep", "drop"] = "keep"
    min_side_px: float = 1.0
    min_inside: float = 0.0
    polygons: Literal["keep", "drop"] = "drop"
    max_objects: int = 0
    over_max: Literal["sample", "drop"] = "sample"


@dataclass(frozen=True, slots=True)
class RecordSet:
    """Records of one split of one set, and everything that was not kept."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    bad_images: list[Problem] = field(default_factory=list)  # those of `problems` that cost a whole image
    categories: tuple[Category, ...] = ()  # those that the file declares


def to_records(
    reading: Reading,
    policies: Policies,
    facts: Mapping[str, ImageFacts] | None = None,
    prefix: str = "",
    seed: int = 0,
) -> RecordSet:
    """Apply the policies to every image of a reading.

    Args:
        reading: what a reader found.
        policies: what to do with the unusual.
        facts: file name -> what is known of the file; None takes the annotated size on trust.
        prefix: put before file names in records.
        seed: of the choice of objects where there are too many.
    """
    result = RecordSet(categories=reading.categories)
    for image in reading.images:
        if problem := image_problem(image, facts):
            result.bad_images.append(problem)
            continue
        record = _record(image, policies, facts, prefix, seed, result.problems)
        if record is not None:
            result.records.append(record)
    result.problems[:0] = reading.problems
    result.problems.extend(result.bad_images)
    return result


def refuse_bad_images(bad: list[Problem]) -> None:
    """Raise DataError if there is any, counting reasons and showing the first ones."""
    if bad:
        counts = ", ".join(f"{reason} {n}" for reason, n in sorted(Counter(p.reason for p in bad).items()))
        shown = "".join(f"\n  {p}" for p in bad[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(
            f"{len(bad)} images cannot be used ({counts}):{shown}{more}\nMend them, or set records.bad_images to drop. "
            "`coordexp doctor` lists all."
        )


def image_problem(image: SourceImage, facts: Mapping[str, ImageFacts] | None) -> Problem | None:
    """Why an image cannot be used at all, or None."""
    if reason := unsafe_name(image.file_name):
        return Problem("image_path_unsafe", image.file, image.key, f"{image.file_name!r} {reason}")
    has_size = image.width is not None and image.height is not None
    if has_size and not (_is_side(image.width) and _is_side(image.height)):
        detail = f"{image.width!r} x {image.height!r} px"
        return Problem("image_size_invalid", image.file, image.key, detail)
    if facts is None:
        return None if has_size else Problem("image_size_invalid", image.file, image.key, "no size given")
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


def _record(
    image: SourceImage,
    policies: Policies,
    facts: Mapping[str, ImageFacts] | None,
    prefix: str,
    seed: int,
    problems: list[Problem],
) -> Record | None:
    size = (image.width, image.height)
    if facts is not None:
        size = (facts[image.file_name].width, facts[image.file_name].height)
    width, height = int(size[0]), int(size[1])
    kept: dict[tuple[str, Box], ObjectRecord] = {}
    for obj in image.objects:
        checked = _object(obj, width, height, policies)
        if isinstance(checked, ObjectRecord) and (checked.desc, checked.bbox_xyxy_px) not in kept:
            kept[checked.desc, checked.bbox_xyxy_px] = checked
            if obj.area_px2 is not None and as_area_px2(obj.area_px2) is None:
                detail = f"{obj.area_px2!r:.40}"
                problems.append(Problem(AREA_INVALID, image.file, f"{image.key}, {obj.key}", detail))
        else:
            reason = checked if isinstance(checked, str) else "duplicate_object"
            problems.append(Problem(reason, image.file, f"{image.key}, {obj.key}"))
    chosen = _at_most(list(kept.values()), image, policies, seed, problems)
    if chosen is None:
        return None
    order = reading_order(as_boxes([o.bbox_xyxy_px for o in chosen]))
    metadata = dict(image.metadata)
    if image.image_id is not None:
        metadata = {"image_id": image.image_id, **metadata}
    return Record(f"{prefix}{image.file_name}", width, height, tuple(chosen[i] for i in order), metadata=metadata)


def _object(obj: SourceObject, width: int, height: int, policies: Policies) -> ObjectRecord | str:
    """The object as it may be kept, or the reason why not."""
    desc = clean_desc(obj.desc)
    if reason := desc_problem(desc):
        return reason
    if obj.box_xyxy is None or not all(map(is_finite, obj.box_xyxy)):
        return "bbox_malformed"
    if obj.iscrowd and policies.crowd == "drop":
        return "crowd"
    if obj.truncated and policies.truncated == "drop":
        return "truncated"
    x1, y1, x2, y2 = obj.box_xyxy
    found = (x1 * width, y1 * height, x2 * width, y2 * height) if obj.in_unit_frame else obj.box_xyxy
    box = _clip(found, width, height)
    if box[2] - box[0] < policies.min_side_px or box[3] - box[1] < policies.min_side_px:
        return "bbox_too_thin"
    if _area(box) < policies.min_inside * _area(found):
        return "bbox_outside"
    metadata: dict[str, Any] = {**obj.metadata, **({"iscrowd": 1} if obj.iscrowd else {})}
    if policies.polygons == "keep" and obj.rings:
        metadata["segmentation"] = [[round(v, 2) for v in ring] for ring in obj.rings]
    # An area that is the box's says nothing more. Others stay where a box is clipped: a mask ends with the image.
    area_px2 = as_area_px2(obj.area_px2)
    return ObjectRecord(str(desc), box, None, metadata, None if area_px2 == _area(box) else area_px2)


def _clip(box: Box, width: int, height: int) -> Box:
    right, bottom = float(width), float(height)
    x1, y1, x2, y2 = box
    return min(max(x1, 0.0), right), min(max(y1, 0.0), bottom), min(max(x2, 0.0), right), min(max(y2, 0.0), bottom)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _at_most(
    objects: list[ObjectRecord], image: SourceImage, policies: Policies, seed: int, problems: list[Problem]
) -> list[ObjectRecord] | None:
    """At most `max_objects` objects (ignore regions do not count), or None where the whole record goes."""
    counted = [o for o in objects if not o.metadata.get("iscrowd")]
    if not policies.max_objects or len(counted) <= policies.max_objects:
        return objects
    if policies.over_max == "drop":
        problems.append(Problem("record_over_max_objects", image.file, image.key, f"{len(counted)} objects"))
        return None
    digest = hashlib.sha256(f"{seed}:{image.file_name}:{image.key}".encode()).digest()
    chosen = random.Random(digest).sample(counted, policies.max_objects)
    lost = [o for o in counted if not any(o is c for c in chosen)]
    problems.extend(Problem("over_max_objects", image.file, image.key, o.desc) for o in lost)
    # Objects that are there but not asked for must not count as false alarms: they become ignore regions.
    regions = [replace(o, metadata={**o.metadata, "iscrowd": 1}) for o in lost]
    return [o for o in objects if o.metadata.get("iscrowd")] + chosen + regions
