"""How far two names are apart, without a text encoder: by the words they share.

Shapes: N predictions, M annotated objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coordexp.records.descriptions import normalise_desc


def name_distance(pred_descs: Sequence[str], gt_descs: Sequence[str]) -> NDArray[np.float64]:
    """Share of words that only one of two names has, (N, M) in [0, 1]: 0 for equal names, 1 for no common word.

    One minus the Jaccard index of the words of the normalised names: "black cat" is 0.5 from "cat", 1 from "dog".
    """
    words_N = [set(normalise_desc(desc).split()) for desc in pred_descs]
    words_M = [set(normalise_desc(desc).split()) for desc in gt_descs]
    distances = [[_distance(a, b) for b in words_M] for a in words_N]
    return np.array(distances, np.float64).reshape(len(words_N), len(words_M))


def _distance(a: set[str], b: set[str]) -> float:
    either = len(a | b)
    return 1.0 - len(a & b) / either if either else 0.0
