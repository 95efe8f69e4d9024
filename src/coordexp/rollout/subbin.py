"""Sub-bin boxes: from the distribution over the bins at each coordinate slot to one position on the bin axis.

A bin is 0.1 % of the image side. The distribution around the emitted bin says where inside and beside it the edge lies,
so a statistic of it can be finer than the token. Bins may be fractional; `geometry.bins.decode_boxes` takes them.

Shapes: N objects, 4 coordinates x1, y1, x2, y2, K bins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LOCAL_RADIUS_BINS = 8  # half-width of the window of `local_expectation`: the default truncation of the soft target


def _expectation(probs_N4K: NDArray[np.floating], _: Floats) -> Floats:
    return probs_N4K @ np.arange(probs_N4K.shape[-1], dtype=np.float64)


def _local_expectation(probs_N4K: NDArray[np.floating], emitted_N4: Floats) -> Floats:
    """Expectation inside a window around the emitted bin: a second mode far away does not pull the edge."""
    offsets_R = np.arange(-LOCAL_RADIUS_BINS, LOCAL_RADIUS_BINS + 1)
    bins_N4R = emitted_N4[..., None].astype(np.int64) + offsets_R
    inside = (bins_N4R >= 0) & (bins_N4R < probs_N4K.shape[-1])
    safe_N4R = np.where(inside, bins_N4R, 0)
    window_N4R = np.where(inside, np.take_along_axis(probs_N4K, safe_N4R, axis=-1), 0.0)
    mass_N4 = window_N4R.sum(axis=-1)
    return np.divide((window_N4R * bins_N4R).sum(axis=-1), mass_N4, out=emitted_N4.copy(), where=mass_N4 > 0)


def _median(probs_N4K: NDArray[np.floating], _: Floats) -> Floats:
    """Where the distribution function crosses one half; bin k is uniform mass over [k - 1/2, k + 1/2]."""
    cdf_N4K = np.cumsum(probs_N4K, axis=-1, dtype=np.float64)
    half_N4 = cdf_N4K[..., -1] / 2
    bin_N4 = (cdf_N4K < half_N4[..., None]).sum(axis=-1)
    mass_N4 = np.take_along_axis(probs_N4K, bin_N4[..., None], axis=-1)[..., 0].astype(np.float64)
    before_N4 = np.take_along_axis(cdf_N4K, bin_N4[..., None], axis=-1)[..., 0] - mass_N4
    return bin_N4 - 0.5 + np.clip((half_N4 - before_N4) / mass_N4, 0, 1)


def _argmax(_: NDArray[np.floating], emitted_N4: Floats) -> Floats:
    return emitted_N4


_RULES: dict[str, Callable[[NDArray[np.floating], Floats], Floats]] = {
    "argmax": _argmax,
    "expectation": _expectation,
    "local_expectation": _local_expectation,
    "median": _median,
}
BOX_RULES = tuple(_RULES)


def decode_bins(rule: str, emitted_N4: NDArray, probs_N4K: NDArray[np.floating]) -> Floats:
    """Bins of the boxes under one of `BOX_RULES`, fractional, shape (N, 4), within [0, K - 1].

    `argmax` is the emitted bins as they are. An axis on which a rule would turn the box over (x2 <= x1, as two broad
    distributions can) keeps its emitted bins.

    Args:
        rule: a name of `BOX_RULES`.
        emitted_N4: the emitted bins, 0..K-1.
        probs_N4K: the distribution at each slot; sums to 1 over K.
    """
    emitted_N4 = np.asarray(emitted_N4, dtype=np.float64).reshape(-1, 4)
    if not len(emitted_N4):
        return emitted_N4
    decoded_N4 = np.clip(_RULES[rule](probs_N4K, emitted_N4), 0, probs_N4K.shape[-1] - 1)
    turned_N2 = decoded_N4[:, 2:] <= decoded_N4[:, :2]
    return np.where(np.tile(turned_N2, 2), emitted_N4, decoded_N4)
