"""K sampled answers per image: a consensus by voting, and the recall of an oracle that picks among the samples.

Two objects are the same if their normalized names are equal and their boxes have an IoU of at least 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from coordexp.errors import DataError
from coordexp.evaluation.table import Floats, Ints
from coordexp.geometry.boxes import Box, as_boxes, pairwise_iou
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import ImageResult, Prediction

SAME_IOU = 0.5

Runs = Sequence[Sequence[ImageResult]]


@dataclass(frozen=True, slots=True, eq=False)
class OracleK:
    """Objects of each image that K samples find at IoU 0.5, category name included.

    Attributes:
        n_gt_I: annotated objects, crowds left out.
        one_I: found by one sample, mean over the K.
        any_I: found by at least one of them: what an oracle that picks among the samples would find.
    """

    n_gt_I: Ints
    one_I: Floats
    any_I: Ints


def oracle_k(runs: Runs) -> OracleK:
    """The headroom of sampling: objects that any of the K samples finds.

    Raises:
        DataError: the runs hold different images.
    """
    found = [np.stack([_found(result) for result in results]) for results in zip(*_aligned(runs), strict=True)]
    return OracleK(
        n_gt_I=np.array([found_KG.shape[1] for found_KG in found]),
        one_I=np.array([found_KG.mean(axis=0).sum() for found_KG in found]),
        any_I=np.array([found_KG.any(axis=0).sum() for found_KG in found]),
    )


def vote(runs: Runs, min_support: int) -> list[ImageResult]:
    """One answer per image from K samples: the objects on which at least `min_support` samples agree.

    A sample supports an object at most once. Each coordinate of the box is the median over the agreeing samples; the
    score is their mean score times the fraction of samples that agree. All other fields come from the first sample.
    """
    if not 1 <= min_support <= len(runs):
        raise DataError(f"min_support is {min_support}, expected 1 to {len(runs)} (the number of samples).")
    voted = []
    for results in zip(*_aligned(runs), strict=True):
        groups = _group([list(result.pred) for result in results])
        kept = [_merge(group, len(runs)) for group in groups if len(group) >= min_support]
        voted.append(replace(results[0], pred=tuple(kept)))
    return voted


def _aligned(runs: Runs) -> list[list[ImageResult]]:
    """The runs, each sorted by image id."""
    ordered = [sorted(run, key=lambda r: r.image_id) for run in runs]
    ids = [[r.image_id for r in run] for run in ordered]
    if not ids or not ids[0] or any(other != ids[0] for other in ids):
        raise DataError(f"{len(runs)} runs have different images; expected the same images, at least one, in each.")
    return ordered


def _found(result: ImageResult) -> np.ndarray:
    """Whether each annotated object is found by this answer, matched one to one."""
    truth = [g for g in result.gt if not g.iscrowd]
    found = np.zeros(len(truth), dtype=bool)
    iou = _same_name_iou([(g.desc, g.bbox_xyxy_px) for g in truth], [(p.desc, p.bbox_xyxy_px) for p in result.pred])
    found[_assign(iou)[0]] = True
    return found


def _group(samples: Sequence[Sequence[Prediction]]) -> list[list[Prediction]]:
    """Groups of predictions of the same object, at most one per sample, in order of first occurrence."""
    groups: list[list[Prediction]] = []
    for predictions in samples:
        centres = [(group[0].desc, _median_box(group)) for group in groups]
        iou = _same_name_iou(centres, [(p.desc, p.bbox_xyxy_px) for p in predictions])
        rows, columns = _assign(iou)
        for row, column in zip(rows, columns, strict=True):
            groups[row].append(predictions[column])
        taken = set(columns.tolist())
        groups += [[p] for i, p in enumerate(predictions) if i not in taken]
    return groups


def _same_name_iou(a: Sequence[tuple[str, Box]], b: Sequence[tuple[str, Box]]) -> Floats:
    """IoU of all pairs; 0 if the names differ."""
    iou = pairwise_iou(as_boxes([box for _, box in a]), as_boxes([box for _, box in b]))
    names_a, names_b = ([normalise_desc(name) for name, _ in side] for side in (a, b))
    same = np.array([[x == y for y in names_b] for x in names_a], dtype=bool).reshape(iou.shape)
    return np.where(same, iou, 0.0)


def _assign(iou: Floats) -> tuple[np.ndarray, np.ndarray]:
    """The largest one-to-one assignment with IoU >= SAME_IOU; of equally large ones, that of highest total IoU."""
    rows, columns = linear_sum_assignment(np.where(iou >= SAME_IOU, -1.0 - iou, 0.0))
    kept = iou[rows, columns] >= SAME_IOU
    return rows[kept], columns[kept]


def _median_box(group: Sequence[Prediction]) -> Box:
    x1, y1, x2, y2 = np.median(as_boxes([p.bbox_xyxy_px for p in group]), axis=0).tolist()
    return x1, y1, x2, y2


def _merge(group: Sequence[Prediction], k: int) -> Prediction:
    """The consensus of a group, without alternative boxes or scores, because those of one member do not apply."""
    scores = [p.score for p in group if p.score is not None]
    if len(scores) < len(group):
        raise DataError("a prediction has no score, which voting needs; score the samples first.")
    score = float(np.mean(scores)) * len(group) / k
    return replace(group[0], bbox_xyxy_px=_median_box(group), score=score, boxes_xyxy_px={}, scores={})
