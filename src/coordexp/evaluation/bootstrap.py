"""Bootstrap over images (Efron 1979): metrics in each resample, and their intervals.

Images are the independent units: the objects of one image share its answer and must stay together. A resample draws as
many images as there are, with replacement, and is stored as the number of times each image occurs. Matching is not
repeated, because it happens within an image: counts are summed and AP is counted again from cached matches, under these
weights. The same seed and number of images give the same resamples, so two evaluations of one image list are paired
resample by resample, which removes the variation that both have in common.

Legend: B resamples, I images, K categories, T IoU thresholds .50:.05:.95.
"""

from __future__ import annotations

import numpy as np

from coordexp.evaluation.average_precision import CategoryMatches, weighted_ap
from coordexp.evaluation.f1 import MODES, GreedyMatches, f1_from_counts, image_f1
from coordexp.evaluation.protocol import COCO_IOUS
from coordexp.evaluation.table import Floats, Ints
from coordexp.infra.random_streams import generator

INTERVAL = (2.5, 97.5)  # percentiles of a 95 % interval


def resample_weights(n_images: int, resamples: int, seed: int) -> Ints:
    """(B, I) how often each image occurs in each resample; rows sum to I."""
    rng = generator(seed, "evaluation/resamples")
    return rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=resamples)


def resampled_f1(matches: GreedyMatches, weights_BI: Ints, area: str = "f1", scope: str = "") -> dict[str, Floats]:
    """(B,) the F1 metrics in each resample, as `<area>.<metric><scope>`.

    Metrics: `loc` and `full`, each at IoU .50, .75, .95 and averaged over .50:.05:.95; for `full` at .50 also
    `precision_50`, `recall_50` and the macro F1. NaN for a resample in which the metric is undefined.
    """
    weights = weights_BI.astype(np.float64)  # float products use BLAS; counts are exact below 2^53
    samples: dict[str, Floats] = {}
    for mode in MODES:
        sums = [weights @ matches.counts(iou, mode).astype(np.float64) for iou in COCO_IOUS]
        by_iou = [f1_from_counts(counts_B3) for counts_B3 in sums]
        samples |= {f"{mode}_{key}": by_iou[t] for key, t in (("50", 0), ("75", 5), ("95", 9))}
        samples[f"{mode}_mean"] = np.mean(by_iou, axis=0)
        if mode == "full":
            tp, fp, fn = sums[0].T
            samples["precision_50"] = np.divide(tp, tp + fp, out=np.full_like(tp, np.nan), where=tp + fp > 0)
            samples["recall_50"] = np.divide(tp, tp + fn, out=np.full_like(tp, np.nan), where=tp + fn > 0)
    samples["full_50_macro"] = weights @ image_f1(matches.counts(0.5, "full")) / weights.shape[1]
    return {f"{area}.{key}{scope}": values for key, values in samples.items()}


def resampled_ap(matches_K: list[CategoryMatches], weights_BI: Ints, rows: dict[str, list[int]]) -> dict[str, Floats]:
    """(B,) AP in each resample, for named sets of categories (rows of K); P of the K have objects.

    Returns `<name>.mAP`, `<name>.AP50` and `<name>.AP75`; NaN for a resample without an object of the set.
    """
    present = [k for k, matches in enumerate(matches_K) if len(matches.gt_image_G)]  # the others have no AP
    place = {k: n for n, k in enumerate(present)}
    ap_PTB = weighted_ap([matches_K[k] for k in present], weights_BI)
    samples: dict[str, Floats] = {}
    for name, members in rows.items():
        ap_TB = mean_of_present(ap_PTB[[place[k] for k in members if k in place]])
        samples[f"{name}.mAP"] = ap_TB.mean(axis=0)
        samples[f"{name}.AP50"] = ap_TB[0]
        samples[f"{name}.AP75"] = ap_TB[5]
    return samples


def mean_of_present(ap_KTB: Floats) -> Floats:
    """Mean over the first axis, ignoring NaN; NaN if all values are NaN, without numpy's warning."""
    present = ~np.isnan(ap_KTB)
    n = present.sum(axis=0)
    return np.divide(np.where(present, ap_KTB, 0.0).sum(axis=0), n, out=np.full(n.shape, np.nan), where=n > 0)


def interval(samples_B: Floats, point: float | None, *, is_share: bool = True) -> list[float] | None:
    """95 % interval [low, high] around the point value; None if the metric or every resample is undefined.

    The interval of a fraction (`is_share`) is clipped to [0, 1].
    """
    known = samples_B[~np.isnan(samples_B)]
    if point is None or not known.size:
        return None
    bounds = np.percentile(_centred(known, point), INTERVAL)
    return (np.clip(bounds, 0, 1) if is_share else bounds).tolist()


def _centred(samples_B: Floats, point: float) -> Floats:
    """Shift the samples so that their mean is the point value: a bias correction of the percentile interval.

    AP averages running maxima of the precision, and a resample repeats images, so resampled AP is biased upward. In 100
    simulations of 300 images, plain percentiles covered the expected AP 89 times, centered ones 95 times.
    """
    return samples_B + (point - samples_B.mean())
