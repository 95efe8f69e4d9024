"""COCO average precision: pycocotools gives the numbers of record, faster-coco-eval identical numbers faster.

Boxes are float pixels. An object is small, medium or large by its annotated area (that of its mask), or by the area of
its box if none is annotated; a detection by the area of its box, as in pycocotools. A value that is undefined (the data
set has no object of that kind) is None here; pycocotools prints -1.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from coordexp.evaluation.categories import NO_CATEGORY
from coordexp.evaluation.protocol import AREA_EDGES_PX2, COCO_IOUS
from coordexp.evaluation.table import DetectionTable, Floats, Ints
from coordexp.geometry.boxes import Boxes, area, xyxy_to_xywh
from coordexp.records.schema import LARGEST_AREA_PX2

Backend = Literal["pycocotools", "faster-coco-eval"]
# COCOeval.stats, in its order.
STAT_NAMES = ("mAP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_FAST_FROM_PREDICTIONS = 50_000


@dataclass(frozen=True, slots=True, eq=False)
class CocoResult:
    """The twelve numbers, and the precision and recall that they average; these are -1 for a category without objects.

    Axes: 10 IoU thresholds, 101 recall points, K categories, 4 areas (all, small, medium, large), 3 limits of
    detections (1, 10, 100).
    """

    stats: dict[str, float | None]
    precision_TRKAM: Floats
    recall_TKAM: Floats
    backend: str
    reason: str

    def ap_KT(self) -> Floats:
        """(K, T) AP over all areas with 100 detections; NaN for a category without objects."""
        ap_TK = self.precision_TRKAM[:, :, :, 0, 2].mean(axis=1)
        return np.where(ap_TK.T > -1, ap_TK.T, np.nan)

    def mean_ap(self, rows: list[int] | None = None, iou: float | None = None) -> float | None:
        """Mean AP of the categories in `rows` (default: all), at one IoU of .50:.05:.95 or averaged over them."""
        ap_KT = self.ap_KT() if rows is None else self.ap_KT()[rows]
        chosen = ap_KT if iou is None else ap_KT[:, np.isclose(COCO_IOUS, iou)]
        return float(np.nanmean(chosen)) if not np.isnan(chosen).all() else None

    def pr_curve(self, iou: float) -> list[float]:
        """Precision at 101 recall points at one IoU, averaged over the categories with objects; empty without any."""
        precision_RK = self.precision_TRKAM[int(np.argmin(abs(COCO_IOUS - iou))), :, :, 0, 2]
        present = precision_RK[0] > -1
        return precision_RK[:, present].mean(axis=1).tolist() if present.any() else []


def coco_ap(table: DetectionTable, backend: Backend | None = None) -> CocoResult:
    """Evaluate with a backend; the default is pycocotools, or the faster one for many predictions."""
    backend, reason = (backend, "asked for") if backend else _choose_backend(table)
    evaluator = _run(table, _library(backend))
    stats = dict(zip(STAT_NAMES, (float(value) for value in evaluator.stats[:12]), strict=True))
    return CocoResult(
        stats={name: None if value < 0 else value for name, value in stats.items()},
        precision_TRKAM=_all_categories(evaluator.eval["precision"], 2, table),
        recall_TKAM=_all_categories(evaluator.eval["recall"], 1, table),
        backend=backend,
        reason=reason,
    )


def _choose_backend(table: DetectionTable) -> tuple[Backend, str]:
    n_pred = len(table.pred_score_P)
    if n_pred <= _FAST_FROM_PREDICTIONS:
        return "pycocotools", f"the number of record; {n_pred} predictions"
    return "faster-coco-eval", f"identical and faster; {n_pred} predictions are more than {_FAST_FROM_PREDICTIONS}"


def _library(backend: Backend) -> tuple[type, type]:
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster

    return FastCOCO, COCOeval_faster


def _run(table: DetectionTable, library: tuple[type, type]) -> Any:
    dataset_type, evaluator_type = library
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries print their progress
        truth, detections = dataset_type(), dataset_type()
        truth.dataset, detections.dataset = ground_truth_dataset(table), detection_dataset(table)
        truth.createIndex()
        detections.createIndex()
        evaluator = evaluator_type(truth, detections, iouType="bbox")
        set_area_ranges(evaluator)
        # The others have no precision or recall, and every pair of an image and a category costs time.
        evaluator.params.catIds = [table.index.categories[row].id for row in _annotated_rows(table)]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def _annotated_rows(table: DetectionTable) -> Ints:
    """The rows of the categories that have an annotation: in order of their ids, as both libraries sort them."""
    return np.unique(table.gt_category_G)


def _all_categories(values: Floats, axis: int, table: DetectionTable) -> Floats:
    """Values of the categories with annotations, with -1 for all others."""
    shape = [*values.shape]
    shape[axis] = len(table.index)
    whole = np.full(shape, -1.0)
    np.moveaxis(whole, axis, 0)[_annotated_rows(table)] = np.moveaxis(values, axis, 0)
    return whole


def set_area_ranges(evaluator: Any) -> None:
    """Separate small, medium and large objects at COCO's area thresholds."""
    small, large = AREA_EDGES_PX2
    evaluator.params.areaRng = [[0, LARGEST_AREA_PX2], [0, small], [small, large], [large, LARGEST_AREA_PX2]]


def ground_truth_dataset(table: DetectionTable) -> dict[str, Any]:
    """The annotations in COCO's JSON format."""
    rows = np.arange(len(table.gt_boxes_G4))
    columns = (table.gt_image_G, table.gt_category_G, table.gt_boxes_G4, table.gt_area_px2_G)
    annotations = _annotations(table, rows, *columns)
    for annotation, crowd in zip(annotations, table.gt_crowd_G.tolist(), strict=True):
        annotation["iscrowd"] = int(crowd)
    return {**_header(table), "annotations": annotations}


def detection_dataset(table: DetectionTable) -> dict[str, Any]:
    """The predictions with a category, in COCO's JSON format."""
    rows = np.flatnonzero(table.pred_category_P != NO_CATEGORY)
    columns = (table.pred_image_P, table.pred_category_P, table.pred_boxes_P4, area(table.pred_boxes_P4))
    annotations = _annotations(table, rows, *columns)
    for annotation, score in zip(annotations, table.pred_score_P[rows].tolist(), strict=True):
        annotation |= {"iscrowd": 0, "score": score}
    return {**_header(table), "annotations": annotations}


def _annotations(
    table: DetectionTable, rows: Ints, image_N: Ints, category_N: Ints, boxes_N4: Boxes, area_px2_N: Floats
) -> list[dict[str, Any]]:
    xywh_N4 = xyxy_to_xywh(boxes_N4[rows])
    category_ids = np.array([c.id for c in table.index.categories])
    columns = (
        (rows + 1).tolist(),  # pycocotools treats an id of 0 as "unmatched"
        table.image_ids_I[image_N[rows]].tolist(),
        category_ids[category_N[rows]].tolist(),
        xywh_N4.tolist(),
        area_px2_N[rows].tolist(),
    )
    names = ("id", "image_id", "category_id", "bbox", "area")
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _header(table: DetectionTable) -> dict[str, Any]:
    images = [
        {"id": int(image_id), "width": int(width), "height": int(height)}
        for image_id, (width, height) in zip(table.image_ids_I, table.sizes_wh_I2, strict=True)
    ]
    return {"images": images, "categories": [{"id": c.id, "name": c.name} for c in table.index.categories]}
