"""Answers of a model in training to a few dev images: counts over all of them, and a figure of some.

The pairing is that of training (`matching`), with a threshold of IoU .50 and category names ignored. A located object
is correct if the normalized names agree too. The full evaluation, with AP and intervals, is for finished checkpoints.

Shapes: P pairs, N predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordexp.config.schema import MatchingParams
from coordexp.drawing.boxes import draw_detections
from coordexp.drawing.panels import (
    FALSE,
    FALSE_SIGN,
    MISSED,
    RIGHT,
    RIGHT_SIGN,
    WRONG_NAME_SIGN,
    grid,
    side_by_side,
)
from coordexp.geometry.bins import box_scale
from coordexp.geometry.boxes import as_boxes
from coordexp.matching.matcher import match
from coordexp.matching.summary import MatchCounts, rounded_ratio
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult
from coordexp.records.images import read_record_rgb
from coordexp.training.duplicates import same_object

PAIRING = MatchingParams(
    lambda_l1=1.0, lambda_iou=1.0, lambda_sem=0.0, semantic="lexical", gate="iou", gate_threshold=0.5
)
DRAWN_IMAGES = 6
_PANEL_PX = 320
_COLUMNS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """One evaluated answer: objects without crowd regions, (prediction, object) pairs, and which pairs share a name."""

    result: ImageResult
    objects: tuple[GroundTruth, ...]
    pairs: NDArray[np.int64]
    iou_P: NDArray[np.float64]
    right_P: NDArray[np.bool_]


def judge_answer(result: ImageResult) -> Judged:
    """Pair the predictions of one image with its objects."""
    objects = tuple(gt for gt in result.gt if not gt.iscrowd)
    scale = box_scale(result.width, result.height)
    pred_N4 = as_boxes([p.bbox_xyxy_px for p in result.pred]) / scale
    gt_M4 = as_boxes([gt.bbox_xyxy_px for gt in objects]) / scale
    matched = match(pred_N4, gt_M4, PAIRING)
    right = [normalise_desc(result.pred[i].desc) == normalise_desc(objects[j].desc) for i, j in matched.pairs]
    return Judged(result, objects, matched.pairs, matched.iou_P, np.array(right, dtype=bool))


def count_answers(answers: Sequence[Judged]) -> dict[str, float | None]:
    """Counts over all answers, and the ratios of their sums; precision, recall and F1 require box and name.

    A ratio is None if its denominator is 0, as in `MatchCounts`.
    """
    n_pred, n_gt = sum(len(a.result.pred) for a in answers), sum(len(a.objects) for a in answers)
    n_located, n_right = sum(len(a.pairs) for a in answers), sum(int(a.right_P.sum()) for a in answers)
    iou_sum = sum(float(a.iou_P.sum()) for a in answers)
    reports = [a.result.parse for a in answers if a.result.parse is not None]
    right, located = MatchCounts(n_pred, n_gt, n_right), MatchCounts(n_pred, n_gt, n_located, iou_sum)
    return {
        "images": len(answers),
        "objects": n_gt,
        "predictions": n_pred,
        "right": n_right,
        "false": right.n_false_positive,
        "missed": right.n_false_negative,
        "precision": rounded_ratio(right.precision),
        "recall": rounded_ratio(right.recall),
        "f1": rounded_ratio(right.f1),
        "f1_boxes": rounded_ratio(located.f1),
        "matched_iou_mean": rounded_ratio(located.matched_iou_mean),
        "dup_pairs_90": sum(duplicate_pairs(a.result) for a in answers),
        "parse_rate": round(sum(report.ok for report in reports) / len(answers), 4),
        "truncated": sum(report.truncated for report in reports),
        "tokens_mean": round(sum(a.result.n_generated_tokens for a in answers) / len(answers), 1),
    }


def duplicate_pairs(result: ImageResult) -> int:
    """Number of prediction pairs that are duplicates by the rule of training (`duplicates.same_object`)."""
    boxes_N4 = as_boxes([p.bbox_xyxy_px for p in result.pred])
    return int(same_object(boxes_N4, [p.desc for p in result.pred]).sum())


def draw_answers(answers: Sequence[Judged], image_root: Path, title: str) -> Image.Image:
    """The first few images, annotations next to predictions; `title` is the heading of the predictions."""
    return grid([answer_tile(answer, image_root, title) for answer in answers[:DRAWN_IMAGES]], _COLUMNS)


def answer_tile(answer: Judged, image_root: Path, title: str) -> Image.Image:
    """One image, annotations next to predictions; `title` is the heading of the predictions."""
    image = read_record_rgb(image_root, answer.result.image)
    shrink = min(1.0, _PANEL_PX / max(image.size))
    if shrink < 1:
        image = image.resize((round(image.width * shrink), round(image.height * shrink)), Image.Resampling.LANCZOS)
    enlarge = max(1, round(_PANEL_PX / max(image.size)))
    found = {int(j) for (_, j), right in zip(answer.pairs, answer.right_P, strict=True) if right}
    truth = draw_detections(
        image,
        as_boxes([gt.bbox_xyxy_px for gt in answer.objects]) * shrink,
        [gt.desc for gt in answer.objects],
        styles=[RIGHT if j in found else MISSED for j in range(len(answer.objects))],
        scale=enlarge,
    )
    located = {int(i): bool(right) for (i, _), right in zip(answer.pairs, answer.right_P, strict=True)}
    signs = {True: RIGHT_SIGN, False: WRONG_NAME_SIGN, None: FALSE_SIGN}
    predicted = draw_detections(
        image,
        as_boxes([p.bbox_xyxy_px for p in answer.result.pred]) * shrink,
        [signs[located.get(i)] + p.desc for i, p in enumerate(answer.result.pred)],
        styles=[RIGHT if located.get(i) else FALSE for i in range(len(answer.result.pred))],
        scale=enlarge,
    )
    return side_by_side([("annotated", truth), (title, predicted)])
