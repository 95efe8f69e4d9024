"""Confidence scores by name: from the model's probabilities to one number per object, normally in (0, 1].

Shapes: N objects, 4 coordinates x1, y1, x2, y2, K bins, Q quadrature nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SCORES = ("constant", "coord_logprob", "desc_logprob", "mix", "spread", "expected_iou", "quality")
# Scores that need a distribution over bins at each slot, which numbers spelled in digits do not have.
DISTRIBUTIONAL = frozenset({"spread", "expected_iou", "quality"})

COORD_FRACTION = 0.7  # weight of the coordinates in `mix`; the rest is that of the name
NODES = 8  # per coordinate: 8^4 boxes per object; the tests measure the error
_OBJECTS_PER_BLOCK = 64  # bounds the memory of the 8^4 boxes


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """The model's probabilities for the objects of one answer.

    `coord_logprobs_N4` and `desc_logprob_N` (mean over the tokens of the category name) are in nats; `boxes_N4` are the
    decoded boxes in bins; `probs_N4K` are the distributions at their slots, None for a codec without bins.
    """

    coord_logprobs_N4: Floats
    desc_logprob_N: Floats
    boxes_N4: Floats
    probs_N4K: NDArray[np.floating] | None


def score_objects(evidence: Evidence) -> dict[str, Floats]:
    """All scores of `SCORES` that the evidence supports, each of shape (N,).

    constant       1: the control, under which AP depends on the order alone
    coord_logprob  geometric mean of the four coordinate probabilities
    desc_logprob   geometric mean of the probabilities of the name's tokens
    mix            weighted mean of the two
    spread         exp(-4 mean sd / sqrt(w h)): each of the four sds lowers it by about its fraction of the side length
    expected_iou   expected IoU of the decoded box with boxes sampled from the four distributions
    quality        expected_iou times desc_logprob: correct box and correct name
    """
    coord_N = np.exp(evidence.coord_logprobs_N4.mean(axis=1)) if len(evidence.boxes_N4) else np.empty(0)
    desc_N = np.exp(evidence.desc_logprob_N)
    scores = {
        "constant": np.ones(len(desc_N)),
        "coord_logprob": coord_N,
        "desc_logprob": desc_N,
        "mix": COORD_FRACTION * coord_N + (1 - COORD_FRACTION) * desc_N,
    }
    if evidence.probs_N4K is None:
        return scores
    expected_N = expected_iou(evidence.boxes_N4, evidence.probs_N4K)
    spread_N = spread(evidence.boxes_N4, evidence.probs_N4K)
    return scores | {"spread": spread_N, "expected_iou": expected_N, "quality": expected_N * desc_N}


def slot_sd(probs_N4K: NDArray[np.floating]) -> Floats:
    """(N, 4) standard deviation of each slot's distribution, in bins."""
    k = np.arange(probs_N4K.shape[-1], dtype=np.float64)
    mean_N4 = probs_N4K @ k
    return np.sqrt(np.clip(probs_N4K @ k**2 - mean_N4**2, 0, None))


def spread(boxes_N4: Floats, probs_N4K: NDArray[np.floating]) -> Floats:
    """(N,) score from the widths of the four distributions relative to the box; see `score_objects`."""
    if not len(boxes_N4):
        return np.empty(0)
    sides_N2 = np.clip(boxes_N4[:, 2:] - boxes_N4[:, :2], 1.0, None)
    return np.exp(-4 * slot_sd(probs_N4K).mean(axis=1) / np.sqrt(sides_N2.prod(axis=1)))


def expected_iou(boxes_N4: Floats, probs_N4K: NDArray[np.floating], nodes: int = NODES) -> Floats:
    """(N,) E[IoU(box, B)], where the coordinates of B are sampled independently from the distributions of their slots.

    Independence is an approximation, because each slot is conditioned on the coordinates emitted before it. A sampled B
    without area counts as IoU 0. Quadrature: each distribution is divided into `nodes` strata of equal mass, which are
    represented by their means.
    """
    out_N = np.empty(len(boxes_N4))
    for first in range(0, len(boxes_N4), _OBJECTS_PER_BLOCK):
        block = slice(first, first + _OBJECTS_PER_BLOCK)
        out_N[block] = _mean_iou(boxes_N4[block], stratum_means(probs_N4K[block], nodes))
    return out_N


def stratum_means(probs_NCK: NDArray[np.floating], nodes: int) -> Floats:
    """(N, C, nodes) means of the equal-mass strata of distributions over K bins.

    With M(k) = sum_{j<=k} j p_j, the integral of the quantile function up to u is M at the last full bin plus a part of
    the next bin. Stratum means are scaled differences of this integral.
    """
    k = np.arange(probs_NCK.shape[-1], dtype=np.float64)
    probs = probs_NCK.astype(np.float64)
    probs = probs / probs.sum(axis=-1, keepdims=True)
    cdf, moment = np.cumsum(probs, axis=-1), np.cumsum(probs * k, axis=-1)
    integrals = np.zeros((*probs.shape[:-1], nodes + 1))
    integrals[..., nodes] = moment[..., -1]
    for q in range(1, nodes):
        u = q / nodes
        crossing = (cdf < u).sum(axis=-1, keepdims=True)  # the bin in which the mass u is reached
        full = np.take_along_axis(moment - probs * k, crossing, axis=-1)
        left = u - np.take_along_axis(cdf - probs, crossing, axis=-1)
        integrals[..., q] = (full + left * crossing)[..., 0]
    return np.diff(integrals, axis=-1) * nodes


def _mean_iou(boxes_N4: Floats, nodes_N4Q: Floats) -> Floats:
    """Mean IoU of each box with the Q^4 boxes of its nodes."""
    (overlap_x, side_x), (overlap_y, side_y) = (_axis_pairs(boxes_N4, nodes_N4Q, axis) for axis in (0, 1))
    area_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(axis=1)
    intersection = overlap_x[:, :, None] * overlap_y[:, None, :]
    union = area_N[:, None, None] + side_x[:, :, None] * side_y[:, None, :] - intersection
    iou = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou.mean(axis=(1, 2))


def _axis_pairs(boxes_N4: Floats, nodes_N4Q: Floats, axis: int) -> tuple[Floats, Floats]:
    """(N, Q^2) overlap with the box, and length, of all sampled intervals of one axis; inverted ones are empty."""
    low, high = nodes_N4Q[:, axis, :, None], nodes_N4Q[:, axis + 2, None, :]
    start, end = boxes_N4[:, axis, None, None], boxes_N4[:, axis + 2, None, None]
    side = np.clip(high - low, 0, None)
    overlap = np.clip(np.minimum(high, end) - np.maximum(low, start), 0, None)
    n = len(boxes_N4)
    return overlap.reshape(n, -1), side.reshape(n, -1)
