"""Limits on lost annotations, shared by the convert stage, `coordexp convert` and `coordexp doctor`.

Dropping an annotation leaves a visible object without one, and training then teaches that nothing is there. Beyond the
limits, a run would learn something else than intended, so it stops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coordexp.config.profile import RecordsConfig
from coordexp.errors import DataError
from coordexp.records.box_frames import EXAMPLES, UNKNOWN
from coordexp.records.policy import AREA_INVALID, INCOMPLETE, RecordSet
from coordexp.records.schema import Record
from coordexp.records.sources.base import Problem

SHOWN = 5  # maximum number of bad images in an error message
ALLOWED = 2  # losses that are always allowed if an object is left: too few for a meaningful fraction
FROM_0 = 0.02  # fraction of boxes before the first pixel that indicates a tool that counts from 0
NOTHING_LOST = frozenset({AREA_INVALID, "picture_repeated"})  # every object is kept
# Dropped because a policy requires it, or because the records contain it already.
HARMLESS = NOTHING_LOST | {
    "crowd", "truncated", "over_max_objects", "record_over_max_objects", "image_in_val", "duplicate_object",
    "phrase_missing", "picture_left_out",
}  # fmt: skip
# These drop an image with all its annotations, as do reasons that start with `image_`.
_OF_IMAGES = frozenset({INCOMPLETE, "record_invalid", "annotation_unreadable", "label_unreadable", "label_unused"})
_REMEDY = "Fix the annotations, or allow more with records.max_lost (coordexp convert: --max-lost)."


@dataclass(frozen=True, slots=True)
class Excess:
    """A loss that must stop a run: its name, its number, a message, and examples."""

    reason: str
    count: int
    message: str
    examples: tuple[str, ...]

    def __str__(self) -> str:
        return "".join([self.message, *(f"\n  {example}" for example in self.examples)])


def excessive_losses(found: RecordSet, config: RecordsConfig) -> list[Excess]:
    """The losses that must stop a run, for one split of one set."""
    if not any_counts(found.records) and (nothing_left := _nothing_left(found)):
        return [nothing_left]
    lost = [p for p in found.problems if p.reason not in HARMLESS]
    images = [p for p in lost if _costs_an_image(p)]
    objects = [p for p in lost if not _costs_an_image(p)]
    checks = (
        _over_limit("too_many_lost", "annotations", objects, found.kept, config, found.frames.cause()),
        _over_limit("too_many_images_lost", "images", images, len(found.records), config, ""),
    )
    excesses = [excess for excess in checks if excess]
    return excesses or _misread(found, config)


def refuse_losses(found: Mapping[str, RecordSet], config: RecordsConfig) -> None:
    """Raise DataError if any loss must stop a run; the message has location, reason and examples."""
    parts = [f"{where}: {e}" for where, records in found.items() for e in excessive_losses(records, config)]
    if parts:
        raise DataError("\n".join(parts))


def refuse_bad_images(found: Mapping[str, RecordSet]) -> None:
    """Raise DataError if there are unusable images; the message has counts by reason and examples."""
    for where, records in found.items():
        bad = records.bad_images
        if bad and not records.records and {p.reason for p in bad} == {"image_missing"}:
            raise DataError(
                f"{where}: none of the {len(bad)} annotated images is there (first: {bad[0]}). Expected the folder "
                "that file names are relative to: check source.sets.<name>.<split>_images (coordexp convert: --images)."
            )
    bad = [p for records in found.values() for p in records.bad_images]
    if bad:
        shown = "".join(f"\n  {p}" for p in bad[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(
            f"{len(bad)} images cannot be used ({by_reason(bad)}):{shown}{more}\nFix them, or set "
            "records.bad_images to drop. `coordexp doctor` lists all of them."
        )


def refuse_empty(splits: Mapping[str, Iterable[Record]]) -> None:
    """Raise DataError if a split has no valid object: it could be used neither for training nor for evaluation."""
    for split, records in splits.items():
        if not any_counts(records):
            raise DataError(
                f"{split}: no record has a valid object (crowd regions do not count); expected at least one. Check "
                "the annotations of the split" + ("; increase records.dev_images." if split == "dev" else ".")
            )


def any_counts(records: Iterable[Record]) -> bool:
    """Whether there is an object that is not an ignore region."""
    return any(not o.metadata.get("iscrowd") for r in records for o in r.objects)


def by_reason(problems: Iterable[Problem]) -> str:
    """ "bbox_too_thin 3, unknown_image 1"."""
    return ", ".join(f"{reason} {n}" for reason, n in sorted(Counter(p.reason for p in problems).items()))


def examples(problems: Iterable[Problem]) -> tuple[str, ...]:
    """The first problems, covering as many reasons as possible."""
    listed = list(problems)
    first: dict[str, Problem] = {}
    for problem in listed:
        first.setdefault(problem.reason, problem)
    chosen = [*first.values(), *(p for p in listed if p is not first[p.reason])]
    return tuple(map(str, chosen[:EXAMPLES]))


def _costs_an_image(problem: Problem) -> bool:
    return problem.reason.startswith("image_") or problem.reason in _OF_IMAGES


def _nothing_left(found: RecordSet) -> Excess | None:
    """The loss if there were annotations, but no valid object is left."""
    # Unusable images may have contained no objects, so they count only if no other image is left.
    lost = [p for p in found.problems if not (found.records and p.reason.startswith("image_"))]
    crowds = sum(len(r.objects) for r in found.records) + sum(p.reason == "crowd" for p in lost)
    if crowds and {p.reason for p in lost} <= HARMLESS:
        message = (
            f"every remaining object ({crowds}) is a crowd region (iscrowd 1), which is neither trained nor counted. "
            "Programs that export run-length masks mark every object this way; to read them as objects, set "
            "records.crowd to as_objects (coordexp convert: --crowd as_objects)."
        )
        return Excess("only_crowds", crowds, message, examples(lost))
    if not lost:
        return None
    message = _with_cause(f"no valid object is left ({by_reason(lost)}).", found.frames.cause())
    return Excess("no_object_left", len(lost), f"{message} Fix the annotations.", examples(lost))


def _over_limit(
    reason: str, what: str, lost: list[Problem], kept: int, config: RecordsConfig, cause: str
) -> Excess | None:
    total = len(lost) + kept
    if len(lost) <= max(ALLOWED, config.max_lost * total):
        return None
    message = (
        f"{len(lost)} of {total} {what} are lost ({len(lost) / total:.1%}), records.max_lost allows "
        f"{config.max_lost:.1%}: {by_reason(lost)}."
    )
    return Excess(reason, len(lost), f"{_with_cause(message, cause)} {_REMEDY}", examples(lost))


def _misread(found: RecordSet, config: RecordsConfig) -> list[Excess]:
    """Boxes in another frame that are nevertheless valid boxes, so that none is dropped."""
    frames = found.frames
    form = frames.other_form()
    allowed = max(ALLOWED, config.max_lost * frames.boxes)
    if form == "from_0":
        count, message = frames.from_0, f"{frames.from_0} of {frames.boxes} boxes start before the first pixel."
        allowed = min(ALLOWED, FROM_0 * frames.boxes)  # VOC's own files have none
    elif form == "pixels" and not frames.beyond:
        count = frames.in_small
        message = f"all {count} boxes in small images are inside them if they are in pixels."
    elif form == "fractions":
        count, message = frames.boxes, f"{frames.boxes} boxes are smaller than a pixel."
    elif form and not frames.reach_out:
        count, message = frames.boxes, f"all {frames.boxes} boxes are in the upper left corner of their images."
    elif frames.reach_out:
        count, message = frames.beyond, f"{frames.beyond} of {frames.boxes} boxes extend beyond their images."
    else:
        return []
    if count <= allowed:
        return []
    message = f"{_with_cause(message, frames.other_reading() or UNKNOWN)} {_REMEDY}"
    return [Excess("boxes_misread", count, message, tuple(frames.examples))]


def _with_cause(message: str, cause: str) -> str:
    return f"{message} Likely cause: {cause}." if cause else message
