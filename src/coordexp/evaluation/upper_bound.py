"""The upper bound of the codec: the metrics of the ground truth after quantization to 1000 bins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from coordexp.evaluation.average_precision import match_categories, mean_ap, unweighted_ap
from coordexp.evaluation.details import AREA_NAMES, SIDE_EDGES_PX, bucket, side_label, side_px
from coordexp.evaluation.f1 import match_greedily, micro_f1
from coordexp.evaluation.protocol import AREA_EDGES_PX2, STANDARD
from coordexp.evaluation.table import Floats, Ints, build_table
from coordexp.geometry.bins import decode_boxes, encode_boxes
from coordexp.geometry.boxes import as_boxes, pairwise_iou
from coordexp.records.categories import Category
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.records.schema import Record

_SCORES = ("mAP", "AP50", "AP75", "AP90", "f1_50", "f1_75", "f1_95")
_BY_SIZE_KEYS = ("mAP", "AP75", "AP90", "f1_95")


def codec_upper_bound(records: Sequence[Record]) -> dict[str, Any]:
    """Evaluate the encoded and decoded box of every annotation as a prediction, scored by its own IoU.

    Crowd regions are not objects. Without objects every score is None, and there are no rows by size.

    Returns:
        n_images, n_objects, mAP, AP50, AP75, AP90, f1_50, f1_75, f1_95, mean_iou, min_iou, and by size `by_area`
        (small, medium and large as in COCO) and `by_side_px` (sqrt(w*h) of the box): n, mAP, AP75, AP90, f1_95 of the
        objects of that size alone, mean_iou, share_95 (IoU >= .95).
    """
    trips = [_round_trip(number, record) for number, record in enumerate(records)]
    ious, sides = (np.concatenate([np.empty(0), *parts]) for parts in ([t[1] for t in trips], [t[2] for t in trips]))
    if not ious.size:
        undefined = dict.fromkeys((*_SCORES, "mean_iou", "min_iou"))
        return {"n_images": len(records), "n_objects": 0, **undefined, "by_area": [], "by_side_px": []}
    results = [t[0] for t in trips]
    areas_px2 = [obj.area_px2 for result in results for obj in result.gt]
    annotated_N = np.array(areas_px2, dtype=np.float64)  # None becomes NaN
    area_px2_N = np.where(np.isnan(annotated_N), sides**2, annotated_N)
    area_N, side_N = bucket(area_px2_N, AREA_EDGES_PX2), bucket(sides, SIDE_EDGES_PX)
    return {
        "n_images": len(results),
        "n_objects": len(ious),
        **_score(results),
        "mean_iou": float(ious.mean()),
        "min_iou": float(ious.min()),
        "by_area": _by_size(results, ious, area_N, AREA_NAMES.__getitem__),
        "by_side_px": _by_size(results, ious, side_N, side_label),
    }


def _score(results: Sequence[ImageResult]) -> dict[str, float | None]:
    names = sorted({normalise_desc(obj.desc) for result in results for obj in result.gt})
    table = build_table(results, [Category(number, name) for number, name in enumerate(names, 1)], STANDARD)
    ap_KT = unweighted_ap(match_categories(table), table.n_images)
    matches = match_greedily(table, 0.5)
    return {
        "mAP": mean_ap(ap_KT),
        **{name: mean_ap(ap_KT[:, t : t + 1]) for name, t in (("AP50", 0), ("AP75", 5), ("AP90", 8))},
        **{name: micro_f1(matches, iou, "full") for name, iou in (("f1_50", 0.5), ("f1_75", 0.75), ("f1_95", 0.95))},
    }


def _round_trip(number: int, record: Record) -> tuple[ImageResult, Floats, Floats]:
    """One record with its encoded and decoded boxes as predictions; and the IoU and side of each box."""
    objects = [obj for obj in record.objects if not obj.metadata.get("iscrowd")]
    boxes_N4 = as_boxes([obj.bbox_xyxy_px for obj in objects])
    bins_N4 = encode_boxes(boxes_N4, record.width, record.height)
    back_N4 = decode_boxes(bins_N4, record.width, record.height)
    iou_N = np.diagonal(pairwise_iou(boxes_N4, back_N4))
    result = ImageResult(
        image_id=number,
        image=record.image,
        width=record.width,
        height=record.height,
        gt=tuple(GroundTruth(obj.desc, obj.bbox_xyxy_px, area_px2=obj.area_px2) for obj in objects),
        pred=tuple(
            Prediction(obj.desc, tuple(box), tuple(bins), score=score)
            for obj, box, bins, score in zip(objects, back_N4.tolist(), bins_N4.tolist(), iou_N.tolist(), strict=True)
        ),
        raw_text="",
        parse=ParseReport(container_found=True, n_valid=len(boxes_N4)),
        finish_reason="stop",
        n_generated_tokens=0,
    )
    return result, iou_N, side_px(boxes_N4)


def _by_size(
    results: Sequence[ImageResult], iou_N: Floats, bucket_N: Ints, label: Callable[[int], str]
) -> list[dict[str, Any]]:
    """One row per bucket, for its objects alone."""
    n_before = np.cumsum([0, *(len(result.gt) for result in results)])
    rows = []
    for number in np.unique(bucket_N).tolist():
        inside_N = bucket_N == number
        chosen = [
            _only(result, np.flatnonzero(inside_N[start:end]).tolist())
            for result, (start, end) in zip(results, pairwise(n_before), strict=True)
        ]
        rows.append(
            {
                "size": label(number),
                "n": int(inside_N.sum()),
                **{key: value for key, value in _score(chosen).items() if key in _BY_SIZE_KEYS},
                "mean_iou": float(iou_N[inside_N].mean()),
                "share_95": float((iou_N[inside_N] >= 0.95).mean()),
            }
        )
    return rows


def _only(result: ImageResult, numbers: Sequence[int]) -> ImageResult:
    return replace(result, gt=tuple(result.gt[n] for n in numbers), pred=tuple(result.pred[n] for n in numbers))
