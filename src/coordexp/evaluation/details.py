"""Detail tables of an evaluation: by category, by size, by image.

COCO's size ranges (32^2 and 96^2 px, of the annotated area if there is one) say little about images of 128 px. The
ranges by octave of the side concern the resolution of coordinates, so they use the box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from coordexp.config.schema import EvalParams
from coordexp.evaluation.average_precision import mean_ap
from coordexp.evaluation.categories import NO_CATEGORY
from coordexp.evaluation.coco import CocoResult
from coordexp.evaluation.f1 import GreedyMatches, category_counts, f1_from_counts, image_f1, precision_recall
from coordexp.evaluation.parse import is_cut
from coordexp.evaluation.protocol import AREA_EDGES_PX2, iou_key
from coordexp.evaluation.set_behaviour import Duplicates, mean_matched_iou
from coordexp.evaluation.table import DetectionTable, Floats, Ints
from coordexp.geometry.boxes import Boxes, area
from coordexp.records.gt_vs_pred import ImageResult


def per_category(table: DetectionTable, coco: CocoResult, matches: GreedyMatches) -> list[dict[str, Any]]:
    """One row per category: counts, AP, AP50, AP75, AR100, and precision, recall and F1 at IoU .50, name included."""
    ap_KT, ar_K = coco.ap_KT(), coco.recall_TKAM[:, :, 0, 2].mean(axis=0)
    counts_K3 = category_counts(table, matches, 0.5)
    f1_K = f1_from_counts(counts_K3)
    rows = []
    for k, category in enumerate(table.index.categories):
        n_gt = int(counts_K3[k, [0, 2]].sum())
        precision, recall = precision_recall(counts_K3[k])
        n_pred = int((table.pred_category_P == k).sum())
        rows.append(
            {
                "id": category.id,
                "name": category.name,
                "split": category.split,
                "n_gt": n_gt,
                "n_pred": n_pred,
                "AP": mean_ap(ap_KT[k : k + 1]),
                "AP50": mean_ap(ap_KT[k : k + 1, :1]),
                "AP75": mean_ap(ap_KT[k : k + 1, 5:6]),
                "AR100": float(ar_K[k]) if n_gt else None,
                "precision_50": precision,
                "recall_50": recall,
                "f1_50": float(f1_K[k]) if n_gt else None,
            }
        )
    return rows


def by_area(table: DetectionTable, coco: CocoResult, matches: GreedyMatches) -> list[dict[str, Any]]:
    """COCO's ranges of object area: AP, AR and the columns of `recall_by_area`; empty ranges have no row."""
    letters = {"small": "s", "medium": "m", "large": "l"}
    rows = recall_by_area(table, matches, AREA_EDGES_PX2)
    return [
        row | {"AP": coco.stats[f"AP{letters[row['area']]}"], "AR100": coco.stats[f"AR{letters[row['area']]}"]}
        for row in rows
    ]


def per_image(
    results: Sequence[ImageResult],
    table: DetectionTable,
    matches: GreedyMatches,
    duplicates: Duplicates,
    params: EvalParams,
) -> list[dict[str, Any]]:
    """One row per image, by image id: the values needed to select images for inspection."""
    full_I3, loc_I3 = matches.counts(0.5, "full"), matches.counts(0.5, "loc")
    unmapped_I = np.bincount(table.pred_image_P[table.pred_category_P == NO_CATEGORY], minlength=table.n_images)
    dup_iou = min(params.duplicate_ious)
    columns = {
        "n_gt": table.n_gt_I,
        "n_pred": table.n_pred_I,
        "tp_50": full_I3[:, 0],
        "fp_50": full_I3[:, 1],
        "fn_50": full_I3[:, 2],
        "f1_full_50": image_f1(full_I3),
        "f1_loc_50": image_f1(loc_I3),
        "matched_iou_mean": mean_matched_iou(matches, 0.5),
        f"dup_pairs_{iou_key(dup_iou)}": duplicates.per_image(dup_iou),
        "n_unmapped": unmapped_I,
    }
    lists = [[None if v != v else v for v in column.tolist()] for column in columns.values()]  # NaN: no match, no mean
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
    ordered = sorted(results, key=lambda r: r.image_id)
    return [
        {
            "image_id": r.image_id,
            "image": r.image,
            **row,
            "parse_ok": r.parse is None or r.parse.ok,
            "truncated": is_cut(r),
        }
        for r, row in zip(ordered, rows, strict=True)
    ]


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
    """Number of objects, recall (IoU .50, .75 and .95, class-agnostic), mean IoU, and accuracy of the names.

    `mean_iou` and `sem_acc` are over the objects found at IoU .50; None if there are none.
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
