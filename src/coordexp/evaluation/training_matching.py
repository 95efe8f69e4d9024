"""Metrics of the training-time matching, in their own area (`rollout`): a match threshold, then Hungarian assignment.

They differ from the F1 of f1.py: names count only if the cost includes them, and the pairs minimize the total cost.
"""

from __future__ import annotations

from coordexp.config.schema import MatchingParams
from coordexp.evaluation.table import DetectionTable, image_slices
from coordexp.geometry.bins import box_scale
from coordexp.matching.matcher import match_images
from coordexp.matching.summary import MatchCounts
from coordexp.records.descriptions import normalise_desc
from coordexp.text.meaning import name_distance


def rollout_metrics(table: DetectionTable, matching: MatchingParams) -> dict[str, float | None]:
    """Ratios of summed counts (None if the denominator is 0), and the number of predictions below the threshold."""
    pred_slices = image_slices(table.pred_image_P, table.n_images)
    gt_slices = image_slices(table.gt_image_G, table.n_images)
    pred_names = sorted({normalise_desc(desc) for desc in table.found})  # pred_name_P indexes this list
    gt_names = [category.name for category in table.index.categories]
    pred, gt, distances = [], [], []
    for (width, height), in_pred, in_gt in zip(table.sizes_wh_I2.tolist(), pred_slices, gt_slices, strict=True):
        scale = box_scale(width, height)
        is_object_G = ~table.gt_crowd_G[in_gt]
        if matching.lambda_sem > 0:
            predicted = [pred_names[i] for i in table.pred_name_P[in_pred]]
            annotated = [gt_names[i] for i in table.gt_category_G[in_gt][is_object_G]]
            distances.append(name_distance(predicted, annotated, matching.semantic))
        pred.append(table.pred_boxes_P4[in_pred] / scale)
        gt.append(table.gt_boxes_G4[in_gt][is_object_G] / scale)
    results = match_images(pred, gt, matching, distances or None)
    counts = sum((MatchCounts.from_result(result) for result in results), MatchCounts())
    return {
        "precision": counts.precision,
        "recall": counts.recall,
        "f1": counts.f1,
        "matched_iou_mean": counts.matched_iou_mean,
        "gate_rejected": sum(result.rejected_pred for result in results),
    }
