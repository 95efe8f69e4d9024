"""All pairs of many images as rows of flat arrays, so that one numpy call serves hundreds of images.

An image has about ten predictions and ten objects. Image by image, the overhead of numpy calls would dominate the time.

Shapes: I images, P predictions and G objects of all of them, R rows: every pair of a prediction and an object of the
same image, image by image, each row by row of its (N, M) matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PairRows:
    """The prediction and the object of each row, numbered across all images.

    Attributes:
        n_pred_I: number of predictions per image.
        n_gt_I: number of objects per image.
        pred_R: prediction of each row.
        gt_R: object of each row.
    """

    n_pred_I: Ints
    n_gt_I: Ints
    pred_R: Ints
    gt_R: Ints

    @classmethod
    def of(cls, n_pred_I: Sequence[int], n_gt_I: Sequence[int]) -> PairRows:
        """The rows of images with these numbers of predictions and objects; any of them may be 0."""
        n_pred, n_gt = np.array(n_pred_I, np.int64), np.array(n_gt_I, np.int64)
        rows_of_pred_P = np.repeat(n_gt, n_pred)
        first_object_P = np.repeat(starts(n_gt)[:-1], n_pred)
        pred_R = np.repeat(np.arange(n_pred.sum()), rows_of_pred_P)
        # Within the rows of one prediction, the object index runs from the first object of its image.
        gt_R = np.arange(len(pred_R)) - np.repeat(starts(rows_of_pred_P)[:-1] - first_object_P, rows_of_pred_P)
        return cls(n_pred, n_gt, pred_R, gt_R)

    @property
    def n_rows_I(self) -> Ints:
        """Number of rows per image."""
        return self.n_pred_I * self.n_gt_I

    def lateness_R(self) -> NDArray[np.float64]:
        """Tie-breaking cost in [0, 1): rises with both indices; its sum is minimal if equals are paired in order."""
        # Rearrangement inequality: the sum of products of two falling sequences is maximal in equal order.
        return 1.0 - _earliness(self.n_pred_I)[self.pred_R] * _earliness(self.n_gt_I)[self.gt_R]


def starts(counts: Ints) -> Ints:
    """Start of each of consecutive pieces, followed by the end of the last piece, shape (I + 1,)."""
    return np.concatenate([[0], np.cumsum(counts)])


def place_within(counts: Ints) -> Ints:
    """0, 1, ... within each of consecutive pieces."""
    return np.arange(counts.sum()) - np.repeat(starts(counts)[:-1], counts)


def _earliness(counts: Ints) -> NDArray[np.float64]:
    """1 for the first item of a piece of n, 1/n for its last."""
    sizes = np.repeat(counts, counts)
    return (sizes - place_within(counts)) / sizes
