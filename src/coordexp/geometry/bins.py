"""The bin codec: 1000 bins over [0, 1], with a single rounding rule.

    encode(c) = clamp(round(1000 c), 0, 999)        decode(k) = k / 1000

`c` is a coordinate divided by the image width or height (never W - 1). Coordinates become tokens as in Pix2Seq
(arXiv:2109.10852, section 2.1). There are 1000 bins because Qwen3-VL writes coordinates as integers from 0 to 1000
relative to the image: a coordinate token then means what the number meant in pretraining. The resolution suffices: half
a bin is 0.32 px in an image of 640 px.

Rounding and float decoding keep the round-trip error at half a bin; flooring would add a half-bin bias up and left. The
right border c = 1 would be bin 1000, which has no token: coordinates in the last half bin (c > 0.9995) clamp to 999, so
their error is at most one bin.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_BINS = 1000
MAX_BIN = NUM_BINS - 1
# The written form of a bin; text/vocabulary.py maps it to token ids.
COORD_TOKENS: tuple[str, ...] = tuple(f"<|coord_{k}|>" for k in range(NUM_BINS))
COORD_PATTERN = re.compile(r"<\|coord_(0|[1-9][0-9]{0,2})\|>")


def encode_norm(coords: ArrayLike) -> NDArray[np.int64]:
    """Encode coordinates in [0, 1] as bins 0..999; values outside are clamped. The caller must exclude NaN."""
    # float64: in float32, products near k + 0.5 could round to the wrong bin.
    return np.clip(np.rint(np.asarray(coords, dtype=np.float64) * NUM_BINS), 0, MAX_BIN).astype(np.int64)


def decode_norm(bins: ArrayLike) -> NDArray[np.float64]:
    """Decode bins (integers, or fractions from a sub-bin readout) to coordinates in [0, 1)."""
    # k / 1000, not (k + 0.5) / 1000: `encode_norm` rounds, so bin k is centered at k / 1000.
    return np.asarray(bins, dtype=np.float64) / NUM_BINS


def box_scale(width: int, height: int) -> NDArray[np.float64]:
    """Return [W, H, W, H], the factor between normalized and pixel xyxy boxes."""
    return np.array([width, height, width, height], dtype=np.float64)


def encode_boxes(boxes_xyxy_px: ArrayLike, width: int, height: int) -> NDArray[np.int64]:
    """Encode pixel xyxy boxes (..., 4) of a W x H image as bins (..., 4)."""
    return encode_norm(np.asarray(boxes_xyxy_px, dtype=np.float64) / box_scale(width, height))


def decode_boxes(bins: ArrayLike, width: int, height: int) -> NDArray[np.float64]:
    """Decode bins (..., 4) to float pixel xyxy boxes (..., 4); never rounded to integers."""
    return decode_norm(bins) * box_scale(width, height)


def target_bins(boxes_xyxy_px: ArrayLike, width: int, height: int) -> NDArray[np.float64]:
    """Return unrounded targets in bin units, clipped to [0, 999]: the supervision of sub-bin losses."""
    scaled = np.asarray(boxes_xyxy_px, dtype=np.float64) / box_scale(width, height) * NUM_BINS
    return np.clip(scaled, 0.0, float(MAX_BIN))
