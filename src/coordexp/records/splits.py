"""Splits: dev is taken out of the training file by a hash of the image, so that no image is in two splits."""

from __future__ import annotations

import hashlib
from typing import Iterable

from coordexp.errors import DataError
from coordexp.records.schema import Record


def split_dev(records: Iterable[Record], dev_images: int) -> tuple[list[Record], list[Record]]:
    """(train, dev): the `dev_images` records with the smallest hash of their image path become dev.

    The choice depends on each image alone: adding images to the source moves few others between splits.
    """
    ranked = sorted(records, key=lambda r: hashlib.sha256(r.image.encode()).digest())
    if dev_images >= len(ranked):
        raise DataError(
            f"records.dev_images is {dev_images} of {len(ranked)} training images; leave some for training."
        )
    dev = {r.image for r in ranked[:dev_images]}
    in_order = sorted(ranked, key=lambda r: r.image)
    return [r for r in in_order if r.image not in dev], [r for r in in_order if r.image in dev]
