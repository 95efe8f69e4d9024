"""Blind controls: the scores that can be reached without looking at the image.

| control | prediction for every image |
|---|---|
| `constant` | one box: the most frequent label at its median position |
| `median_box` | the median box of each of the most frequent labels, scored by the number of images with the label |
| `dealt` | the model's own answer to another image (predictions shuffled across images) |

The first two use frequencies and positions of the very annotations of the evaluation, which a model does not have, so
they are strong controls. Positions are fractions of the image's sides. If the lower end of the paired interval shows no
AP50 above that of the best control, this data set shows no learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coordexp.evaluation.average_precision import CategoryMatches, match_categories, weighted_ap
from coordexp.evaluation.bootstrap import mean_of_present
from coordexp.evaluation.f1 import match_greedily, micro_f1
from coordexp.evaluation.table import DetectionTable, Floats, Ints, image_slices
from coordexp.infra.random_streams import generator

MEDIAN_LABELS = 20
MARGIN = "blind.margin_AP50"


def constant_answer(table: DetectionTable) -> DetectionTable:
    """One box in every image: the most frequent label at its median position, score 1."""
    return _same_answer(table, 1)


def median_boxes(table: DetectionTable) -> DetectionTable:
    """In every image the median box of each of the most frequent labels, scored by the fraction of images with it."""
    return _same_answer(table, MEDIAN_LABELS)


def _same_answer(table: DetectionTable, n_labels: int) -> DetectionTable:
    objects_G = ~table.gt_crowd_G
    category_G, image_G = table.gt_category_G[objects_G], table.gt_image_G[objects_G]
    count_K = np.bincount(category_G, minlength=len(table.index))
    labels_L = np.argsort(-count_K, kind="stable")[: min(n_labels, np.count_nonzero(count_K))]
    places_G4 = table.gt_boxes_G4[objects_G] / _scale(table, image_G)
    places_L4 = np.array([np.median(places_G4[category_G == k], axis=0) for k in labels_L]).reshape(-1, 4)
    in_images_L = np.array([len(np.unique(image_G[category_G == k])) for k in labels_L], dtype=np.float64)
    image_P = np.repeat(np.arange(table.n_images, dtype=np.int64), len(labels_L))
    boxes_P4 = np.tile(places_L4, (table.n_images, 1)) * _scale(table, image_P)
    return _answered(table, image_P, boxes_P4, np.tile(labels_L, table.n_images),
                     np.tile(in_images_L / table.n_images, table.n_images))  # fmt: skip


def dealt_answers(table: DetectionTable, seed: int) -> DetectionTable:
    """The predictions of the table shuffled across images, positions kept as fractions; needs two images."""
    order = generator(seed, "evaluation/dealt").permutation(table.n_images)
    source_I = np.empty(table.n_images, dtype=np.int64)
    source_I[order] = np.roll(order, 1)  # one cycle through all images, so that no image keeps its own answer
    slices = image_slices(table.pred_image_P, table.n_images)
    rows_P = np.concatenate([np.arange(slices[i].start, slices[i].stop) for i in source_I.tolist()])
    image_P = np.repeat(np.arange(table.n_images, dtype=np.int64), table.n_pred_I[source_I])
    places_P4 = table.pred_boxes_P4[rows_P] / _scale(table, table.pred_image_P[rows_P])
    return _answered(table, image_P, places_P4 * _scale(table, image_P), table.pred_category_P[rows_P],
                     table.pred_score_P[rows_P])  # fmt: skip


def _scale(table: DetectionTable, image_N: Ints) -> Floats:
    """(N, 4) width, height, width, height of each row's image."""
    return np.tile(table.sizes_wh_I2[image_N], (1, 2)).astype(np.float64)


def _answered(
    table: DetectionTable, image_P: Ints, boxes_P4: Floats, category_P: Ints, score_P: Floats
) -> DetectionTable:
    return replace(
        table, pred_image_P=image_P, pred_boxes_P4=boxes_P4, pred_category_P=category_P,
        pred_name_P=np.zeros(len(image_P), dtype=np.int64), pred_score_P=score_P, candidates={},
    )  # fmt: skip


def blind_controls(table: DetectionTable, seed: int) -> dict[str, DetectionTable]:
    """The controls that are defined: none without annotated objects, no `dealt` for a single image."""
    if not table.n_gt_I.any():
        return {}
    controls = {"constant": constant_answer(table), "median_box": median_boxes(table)}
    return controls | ({"dealt": dealt_answers(table, seed)} if table.n_images > 1 else {})


CONTROLS = ("constant", "median_box", "dealt")


def blind_metrics(
    table: DetectionTable, by_score: Sequence[CategoryMatches], weights_BI: Ints, seed: int
) -> tuple[dict[str, float | None], Floats]:
    """The `blind` area, and (B,) the margin over the best control in each resample; `by_score` are the own matches."""
    names = [f"{name}_{key}" for name in CONTROLS for key in ("AP50", "full_50")]
    metrics: dict[str, float | None] = dict.fromkeys([*names, "margin_AP50"])
    own, own_B = _ap50(by_score, weights_BI)
    best, best_B = -np.inf, np.full(len(weights_BI), -np.inf)
    for name, control in blind_controls(table, seed).items():
        ap50, ap50_B = _ap50(match_categories(control), weights_BI)
        metrics[f"{name}_AP50"] = ap50
        metrics[f"{name}_full_50"] = micro_f1(match_greedily(control, 0.5), 0.5, "full")
        if ap50 is not None:
            best, best_B = max(best, ap50), np.maximum(best_B, ap50_B)
    if own is None or not np.isfinite(best):
        return metrics, np.full(len(weights_BI), np.nan)
    return metrics | {"margin_AP50": own - best}, own_B - best_B


def _ap50(matches_K: Sequence[CategoryMatches], weights_BI: Ints) -> tuple[float | None, Floats]:
    """AP at IoU .50 over the categories that have objects, and (B,) the same in each resample."""
    first = [replace(m, tp_TD=m.tp_TD[:1], ignored_TD=m.ignored_TD[:1]) for m in matches_K]
    ones = np.ones((1, weights_BI.shape[1]), dtype=weights_BI.dtype)
    mean_B = mean_of_present(weighted_ap(first, np.concatenate([ones, weights_BI]))[:, 0])
    return (None if np.isnan(mean_B[0]) else float(mean_B[0])), mean_B[1:]


def learned_nothing(margin: float | None, interval: Sequence[float] | None) -> str:
    """Why predictions show no learning, in words, from `blind.margin_AP50`; empty if they beat every blind control."""
    if margin is None or interval is None or interval[0] > 0:
        return ""
    low, high = interval
    return f"AP50 minus that of the best blind control is {margin:+.3f} [{low:+.3f}, {high:+.3f}]"
