"""When so much of a source is lost that a run would learn something else: the convert stage, `coordexp convert` and
`coordexp doctor` stop by this one rule.

An annotation that cannot be used leaves its image with an object fewer, and training teaches that nothing is there.
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

SHOWN = 5  # bad images in an error
ALLOWED = 2  # losses that stop nothing where an object is left: too few for a fraction to say anything
FROM_0 = 0.02  # fraction of boxes before the first pixel that says that a tool counts from 0
NOTHING_LOST = frozenset({AREA_INVALID, "picture_repeated"})  # every object is kept
# Not kept, but asked for by a policy, or nothing that the records do not hold already.
HARMLESS = NOTHING_LOST | {
    "crowd", "truncated", "over_max_objects", "record_over_max_objects", "image_in_val", "duplicate_object",
    "phrase_missing", "picture_left_out",
}  # fmt: skip
# These cost an image with all its annotations, as do those that begin with `image_`.
_OF_IMAGES = frozenset({INCOMPLETE, "record_invalid", "annotation_unreadable", "label_unreadable", "label_unused"})
_REMEDY = "Fix the annotations, or allow more with records.max_lost (coordexp convert: --max-lost)."


@dataclass(frozen=True, slots=True)
class Excess:
    """A loss that must stop a run: its name, how many are lost, and in words what was found and what to do."""

    reason: str
    count: int
    message: str
    examples: tuple[str, ...]

    def __str__(self) -> str:
        return "".join([self.message, *(f"\n  {example}" for example in self.examples)])


def excessive_losses(found: RecordSet, config: RecordsConfig) -> list[Excess]:
    """What must stop a run in one split of one set; empty if nothing does."""
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
    """Raise DataError if anything must stop: what is lost where (such as set and split), by reason, with examples."""
    parts = [f"{where}: {e}" for where, records in found.items() for e in excessive_losses(records, config)]
    if parts:
        raise DataError("\n".join(parts))


def refuse_bad_images(found: Mapping[str, RecordSet]) -> None:
    """Raise DataError if there is any, counting reasons and showing the first ones."""
    for where, records in found.items():
        bad = records.bad_images
        if bad and not records.records and {p.reason for p in bad} == {"image_missing"}:
            raise DataError(
                f"{where}: none of the {len(bad)} annotated images is there (first: {bad[0]}). Expected the folder "
                "that file names start from: is source.sets.<name>.<split>_images (coordexp convert: --images) right?"
            )
    bad = [p for records in found.values() for p in records.bad_images]
    if bad:
        shown = "".join(f"\n  {p}" for p in bad[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(
            f"{len(bad)} images cannot be used ({by_reason(bad)}):{shown}{more}\nMend them, or set "
            "records.bad_images to drop. `coordexp doctor` lists all."
        )


def refuse_empty(splits: Mapping[str, Iterable[Record]]) -> None:
    """Raise DataError if no object of a split counts: nothing could be trained or judged on it."""
    for split, records in splits.items():
        if not any_counts(records):
            raise DataError(
                f"{split}: no record holds an object that counts (crowd regions do not); expected at least one. Check "
                "the annotations of the split" + ("; raise records.dev_images." if split == "dev" else ".")
            )


def any_counts(records: Iterable[Record]) -> bool:
    """Whether there is an object that is no ignore region."""
    return any(not o.metadata.get("iscrowd") for r in records for o in r.objects)


def by_reason(problems: Iterable[Problem]) -> str:
    """ "bbox_too_thin 3, unknown_image 1"."""
    return ", ".join(f"{reason} {n}" for reason, n in sorted(Counter(p.reason for p in problems).items()))


def examples(problems: Iterable[Problem]) -> tuple[str, ...]:
    """The first problems, of as many reasons as possible."""
    listed = list(problems)
    first: dict[str, Problem] = {}
    for problem in listed:
        first.setdefault(problem.reason, problem)
    chosen = [*first.values(), *(p for p in listed if p is not first[p.reason])]
    return tuple(map(str, chosen[:EXAMPLES]))


def _costs_an_image(problem: Problem) -> bool:
    return problem.reason.startswith("image_") or problem.reason in _OF_IMAGES


def _nothing_left(found: RecordSet) -> Excess | None:
    """Why there were annotations, but no object that counts is left."""
    # Images that cannot be used may have held nothing; they say something only where no other image is left.
    lost = [p for p in found.problems if not (found.records and p.reason.startswith("image_"))]
    crowds = sum(len(r.objects) for r in found.records) + sum(p.reason == "crowd" for p in lost)
    if crowds and {p.reason for p in lost} <= HARMLESS:
        message = (
            f"every object that is left ({crowds}) is a crowd region (iscrowd 1), which is neither trained nor "
            "counted. Programs that export run-length masks mark every object so; to read them as objects, set "
            "records.crowd to as_objects (coordexp convert: --crowd as_objects)."
        )
        return Excess("only_crowds", crowds, message, examples(lost))
    if not lost:
        return None
    message = _with_cause(f"no object that counts is left ({by_reason(lost)}).", found.frames.cause())
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
    """Boxes that stay boxes although their numbers are of another frame."""
    frames = found.frames
    form = frames.other_form()
    allowed = max(ALLOWED, config.max_lost * frames.boxes)
    if form == "from_0":
        count, message = frames.from_0, f"{frames.from_0} of {frames.boxes} boxes begin before the first pixel."
        allowed = min(ALLOWED, FROM_0 * frames.boxes)  # VOC's own files have none
    elif form == "pixels" and not frames.beyond:
        count = frames.in_small
        message = f"all {count} boxes in images of short sides lie inside them if they are pixels."
    elif form == "fractions":
        count, message = frames.boxes, f"{frames.boxes} boxes are smaller than a pixel."
    elif form and not frames.reach_out:
        count, message = frames.boxes, f"all {frames.boxes} boxes lie in the upper left corner of their images."
    elif frames.reach_out:
        count, message = frames.beyond, f"{frames.beyond} of {frames.boxes} boxes reach out of their images."
    else:
        return []
    if count <= allowed:
        return []
    message = f"{_with_cause(message, frames.other_reading() or UNKNOWN)} {_REMEDY}"
    return [Excess("boxes_misread", count, message, tuple(frames.examples))]


def _with_cause(message: str, cause: str) -> str:
    return f"{message} Likely cause: {cause}." if cause else message
