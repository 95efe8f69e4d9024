"""Tables beside the metrics: by category, by size, by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coordexp.config.schema import EvalParams
from coordexp.evaluation.average_precision import mean_ap
from coordexp.evaluation.categories import NO_CATEGORY
from coordexp.evaluation.coco import CocoResult
from coordexp.evaluation.f1 import GreedyMatches, category_counts, f1_from_counts, image_f1, precision_recall
from coordexp.evaluation.protocol import AREA_EDGES_PX2, iou_key
from coordexp.evaluation.set_behaviour import Duplicates, mean_matched_iou
from coordexp.evaluation.sizes import recall_by_area
from coordexp.evaluation.table import DetectionTable
from coordexp.records.gt_vs_pred import ImageResult


def per_category(table: DetectionTable, coco: CocoResult, matches: GreedyMatches) -> list[dict[str, Any]]:
    """One row for each category: counts, AP, AP50, AP75, AR100, and at IoU .50 precision, recall and F1 by name."""
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
    """COCO's bands of object area: AP and AR beside what `recall_by_area` says; bands without objects have no row."""
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
    """One row for each image, by image id: what is needed to choose the images worth looking at."""
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
        {"image_id": r.image_id, "image": r.image, **row, "parse_ok": r.parse.ok, "truncated": r.parse.truncated}
        for r, row in zip(ordered, rows, strict=True)
    ]
