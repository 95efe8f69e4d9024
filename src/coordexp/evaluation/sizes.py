"""Results by object size: COCO's three bands by area, and bands of our own by octave of the box's side.

COCO's bands (32^2 and 96^2 px, of the annotated area where there is one) say little about images of 128 px. Ours are
about what the coordinates must express, so they go by the box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from coordexp.evaluation.f1 import GreedyMatches
from coordexp.evaluation.table import DetectionTable, Floats, Ints
from coordexp.geometry.boxes import Boxes, area

SIDE_EDGES_PX = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
AREA_NAMES = ("small", "medium", "large")
_RECALL_IOUS = (("50", 0.5), ("75", 0.75), ("95", 0.95))


def side_px(boxes_N4: Boxes) -> Floats:
    """Side of the square of the same area, sqrt(w * h), shape (N,)."""
    return np.sqrt(area(boxes_N4))


def bucket(sizes_N: Floats, edges: Sequence[float]) -> Ints:
    """Number of edges at or below each size: 0 is under the first edge."""
    return np.searchsorted(np.asarray(edges), sizes_N, side="right")


def side_label(number: int) -> str:
    """Name of a bucket of SIDE_EDGES_PX, such as "8-16"."""
    edges = [f"{edge:g}" for edge in SIDE_EDGES_PX]
    if number == 0:
        return f"<{edges[0]}"
    return f">={edges[-1]}" if number == len(edges) else f"{edges[number - 1]}-{edges[number]}"


def recall_by_side(table: DetectionTable, matches: GreedyMatches) -> list[dict[str, Any]]:
    """For each octave of the object's side, `side_px`: what `_recall_rows` says."""
    bucket_G = bucket(side_px(table.gt_boxes_G4), SIDE_EDGES_PX)
    return [{"side_px": side_label(number), **row} for number, row in _recall_rows(table, matches, bucket_G)]


def recall_by_area(
    table: DetectionTable, matches: GreedyMatches, edges_px2: tuple[float, float]
) -> list[dict[str, Any]]:
    """For small, medium and large objects (`gt_area_px2_G`, as in COCO): what `_recall_rows` says."""
    bucket_G = bucket(table.gt_area_px2_G, edges_px2)
    return [{"area": AREA_NAMES[number], **row} for number, row in _recall_rows(table, matches, bucket_G)]


def _recall_rows(table: DetectionTable, matches: GreedyMatches, bucket_G: Ints) -> Iterator[tuple[int, dict[str, Any]]]:
    """How many objects, how many found (IoU .50, .75 and .95, names ignored), how well, and how well named.

    `mean_iou` and `sem_acc` are over the objects found at IoU .50, None if there are none.
    """
    iou_G, named_G = np.zeros(len(table.gt_image_G)), np.zeros(len(table.gt_image_G), dtype=bool)
    iou_G[matches.gt_M], named_G[matches.gt_M] = matches.iou_M, matches.same_name_M
    for number in np.unique(bucket_G[~table.gt_crowd_G]).tolist():
        inside_G = (bucket_G == number) & ~table.gt_crowd_G
        found_G = inside_G & (iou_G >= 0.5)
        yield (
            number,
            {
                "n_gt": int(inside_G.sum()),
                **{f"recall_{key}": float((iou_G[inside_G] >= iou).mean()) for key, iou in _RECALL_IOUS},
                "mean_iou": float(iou_G[found_G].mean()) if found_G.any() else None,
                "sem_acc": float(named_G[found_G].mean()) if found_G.any() else None,
            },
        )
