"""Results by object size. COCO's bands (32^2 and 96^2 px) say little about images of 128 px; these are by octave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coordexp.evaluation.f1 import GreedyMatches
from coordexp.evaluation.table import DetectionTable, Floats, Ints
from coordexp.geometry.boxes import Boxes, area

SIDE_EDGES_PX = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


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
    """For each size of object: how many, how many found (IoU .50 and .75, names ignored), how well, and how well named.

    `mean_iou` and `sem_acc` are over the objects found at IoU .50, None if there are none.
    """
    iou_G, named_G = np.zeros(len(table.gt_image_G)), np.zeros(len(table.gt_image_G), dtype=bool)
    iou_G[matches.gt_M], named_G[matches.gt_M] = matches.iou_M, matches.same_name_M
    bucket_G = np.where(table.gt_crowd_G, -1, bucket(side_px(table.gt_boxes_G4), SIDE_EDGES_PX))
    rows = []
    for number in np.unique(bucket_G[bucket_G >= 0]):
        inside_G = bucket_G == number
        found_G = inside_G & (iou_G >= 0.5)
        rows.append(
            {
                "side_px": side_label(int(number)),
                "n_gt": int(inside_G.sum()),
                "recall_50": float(found_G.sum() / inside_G.sum()),
                "recall_75": float((inside_G & (iou_G >= 0.75)).sum() / inside_G.sum()),
                "mean_iou": float(iou_G[found_G].mean()) if found_G.any() else None,
                "sem_acc": float(named_G[found_G].mean()) if found_G.any() else None,
            }
        )
    return rows
