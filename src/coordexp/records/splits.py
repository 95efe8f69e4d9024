"""Splits: dev is taken out of the training file by a hash of the image, so that no image is in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from coordexp.errors import DataError
from coordexp.records.schema import Record


def split_dev(
    records: Iterable[Record], dev_images: int, content: Mapping[str, str] | None = None
) -> tuple[list[Record], list[Record]]:
    """(train, dev): the `dev_images` images with the smallest hash become dev, with all their records.

    The choice depends on each image alone: adding images to the source moves few others between splits.

    Args:
        records: the training records; one image may have several.
        dev_images: how many images to take.
        content: image -> hash of its file. One picture under two names then stays in one split. None tells images
            apart by their path.
    """
    listed = sorted(records, key=lambda r: r.image)
    content_of = {r.image: content[r.image] if content is not None else r.image for r in listed}
    ranked = sorted(set(content_of.values()), key=lambda c: hashlib.sha256(c.encode()).digest())
    if dev_images >= len(ranked):
        raise DataError(
            f"records.dev_images is {dev_images} of {len(ranked)} training images; leave some for training."
        )
    dev = set(ranked[:dev_images])
    return [r for r in listed if content_of[r.image] not in dev], [r for r in listed if content_of[r.image] in dev]


def overlap(train: Sequence[Record], val: Sequence[Record], content: Mapping[str, str]) -> dict[str, str]:
    """Training image -> the val image with the same content, for every one there is."""
    of_val = {content[r.image]: r.image for r in val}
    return {r.image: of_val[content[r.image]] for r in train if content[r.image] in of_val}


def same_pictures(records: Iterable[Record], content: Mapping[str, str]) -> dict[str, str]:
    """Image -> another image of the records with the same content, for every one after the first."""
    first: dict[str, str] = {}
    pairs = ((r.image, first.setdefault(content[r.image], r.image)) for r in records)
    return {image: other for image, other in pairs if image != other}
