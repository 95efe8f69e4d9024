"""Localisation-Recall-Precision error (Oksuz et al., arXiv 2011.10772): one number per object, for a set with a cut.

Each object and each false box costs 1, unless a box of the right name is on it: then it costs (1 - IoU) / (1 - .5).
Unlike calibration it cannot be improved by dropping the hard objects, and unlike AP it judges the scores by the best
cut they allow. The optimum over cuts is taken for each category (oLRP, equations 9 and 10).

Legend: D detections of one category by falling score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coordexp.evaluation.coco_matching import CategoryMatches
from coordexp.evaluation.protocol import COCO_IOUS
from coordexp.evaluation.table import DetectionTable, Floats

_TAU = COCO_IOUS[0]


def lrp_metrics(table: DetectionTable, matches_K: Sequence[CategoryMatches]) -> dict[str, float | None]:
    """Means over the categories that have objects: `lrp` at the best cut, and there `lrp_loc`, `lrp_fp`, `lrp_fn`.

    `lrp_loc` is the mean 1 - IoU of the hits, over categories that have any; `lrp_fp` is 1 - precision, `lrp_fn` is
    1 - recall. All are None if no category has objects.
    """
    optima = [best_cut(m, table.pred_score_P[m.pred_D]) for m in matches_K if len(m.gt_image_G)]
    if not optima:
        return dict.fromkeys(("lrp", "lrp_loc", "lrp_fp", "lrp_fn"))
    lrp, loc, fp, fn = np.array(optima).T
    return {
        "lrp": float(lrp.mean()),
        "lrp_loc": float(np.nanmean(loc)) if not np.isnan(loc).all() else None,
        "lrp_fp": float(fp.mean()),
        "lrp_fn": float(fn.mean()),
    }


def best_cut(matches: CategoryMatches, score_D: Floats) -> tuple[float, float, float, float]:
    """LRP, 1 - IoU of the hits (NaN without one), 1 - precision and 1 - recall, at the score where LRP is least.

    Cuts lie between different scores, so equal ones stay together; above all scores nothing is predicted and LRP is 1.
    """
    n_gt = len(matches.gt_image_G)
    hit_D = matches.tp_TD[0]
    cut_ends = np.append(score_D[1:] != score_D[:-1], True)[: len(score_D)]
    n_hit, n_false = (np.append(0, np.cumsum(flags)[cut_ends]) for flags in (hit_D, ~hit_D & ~matches.ignored_TD[0]))
    lost = np.append(0.0, np.cumsum(np.where(hit_D, 1 - matches.iou_D, 0.0))[cut_ends])
    lrp = (lost / (1 - _TAU) + n_false + (n_gt - n_hit)) / (n_gt + n_false)
    best = int(np.argmin(lrp))
    hits, false = int(n_hit[best]), int(n_false[best])
    loc = float(lost[best] / hits) if hits else float("nan")
    return float(lrp[best]), loc, false / (hits + false) if hits + false else 0.0, 1 - hits / n_gt
