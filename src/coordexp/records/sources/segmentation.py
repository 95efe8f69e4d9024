"""Where an object lies by its outline: COCO's polygons and run-length masks, for annotations without a usable box."""

from __future__ import annotations

import re
from typing import Any

from pycocotools import mask

from coordexp.geometry.boxes import Box
from coordexp.records.sources.base import around, is_finite, is_whole

MAX_SIDE_PX = 1 << 20
# The alphabet of compressed counts. The last character must end a number: pycocotools would read on behind the text.
_COMPRESSED = re.compile(r"[0-o]*[0-O]")


def polygon_rings(value: Any) -> tuple[tuple[float, ...], ...]:
    """COCO's polygon form, also a single ring without its list; a run-length mask or anything else gives no ring."""
    if not isinstance(value, list):
        return ()
    rings = [value] if value and not isinstance(value[0], list) else value
    return tuple(
        tuple(float(v) for v in ring)
        for ring in rings
        if isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 and all(map(is_finite, ring))
    )


def tight_box(value: Any) -> Box | None:
    """The box around a `segmentation`, in pixels; None where it is empty or neither polygons nor a run-length mask."""
    if isinstance(value, dict):
        return _mask_box(value.get("size"), value.get("counts"))
    rings = polygon_rings(value)
    return around([v for ring in rings for v in ring]) if rings else None


def _mask_box(size: Any, counts: Any) -> Box | None:
    if not isinstance(size, list) or len(size) != 2 or not all(is_whole(v) and 0 < v <= MAX_SIDE_PX for v in size):
        return None
    height, width = (int(v) for v in size)
    code: dict[str, Any] = {"size": [height, width]}
    if isinstance(counts, str) and _COMPRESSED.fullmatch(counts):
        code["counts"] = counts.encode()
    elif isinstance(counts, list) and all(is_whole(n) and n >= 0 for n in counts) and sum(counts) == height * width:
        code = mask.frPyObjects(code | {"counts": [int(n) for n in counts]}, height, width)
    else:
        return None
    x, y, w, h = (float(v) for v in mask.toBbox(code))
    return (x, y, x + w, y + h) if w > 0 and h > 0 else None
