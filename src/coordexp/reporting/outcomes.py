"""The outcome of every box of one checkpoint: error types under COCO's matching, and the pairs of the F1 metrics.

Legend: G annotated objects, P predictions, M matched pairs; rows as in the DetectionTable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coordexp.config.schema import EvalParams
from coordexp.evaluation.categories import NO_CATEGORY
from coordexp.evaluation.error_causes import Cause, find_causes
from coordexp.evaluation.f1 import GreedyMatches, match_greedily
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.table import Bools, DetectionTable, Ints, build_table
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult

MATCH_IOU = 0.5  # from here on a box is correct
LOWEST_IOU = 0.3  # pairs below it are ignored
UNKNOWN_NAME = "(other name)"


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The error type of every prediction (a `Cause`), and whether each object is found, at IoU 0.5."""

    results: tuple[ImageResult, ...]  # by image id
    table: DetectionTable
    matches: GreedyMatches
    cause_P: Ints
    object_P: Ints  # the object that a prediction belongs to (-1: none), as in ErrorCauses
    found_G: Bools  # matched by a box of the correct name

    def of_image(self, image_id: int) -> tuple[ImageResult, slice, slice]:
        """The image's result and the rows of its predictions and objects."""
        image = int(np.searchsorted(self.table.image_ids_I, image_id))
        preds, objects = (
            slice(*np.searchsorted(column, (image, image + 1)).tolist())  # it rises: a table goes by image
            for column in (self.table.pred_image_P, self.table.gt_image_G)
        )
        return self.results[image], preds, objects

    def confusions(self) -> Counter[tuple[str, str]]:
        """(annotated name, predicted name) -> predictions with a classification error, IoU 0.5."""
        names = [category.name for category in self.table.index.categories]
        pairs: Counter[tuple[str, str]] = Counter()
        for pred in np.flatnonzero(self.cause_P == Cause.CLASSIFICATION).tolist():
            predicted, true = int(self.table.pred_category_P[pred]), self.table.gt_category_G[self.object_P[pred]]
            pairs[names[true], UNKNOWN_NAME if predicted == NO_CATEGORY else names[predicted]] += 1
        return pairs

    def named_right(self) -> Counter[str]:
        """Annotated name -> objects matched at IoU 0.5 with the correct name."""
        names = [category.name for category in self.table.index.categories]
        return Counter(names[category] for category in self.table.gt_category_G[self.found_G].tolist())


def judge(results: Sequence[ImageResult], categories: Sequence[Category], params: EvalParams = STANDARD) -> Outcomes:
    """Match the predictions of one checkpoint, with names mapped as `params` specifies.

    Raises:
        DataError: the results break their contract.
    """
    table = build_table(results, categories, params)
    matches = match_greedily(table, LOWEST_IOU)
    causes = find_causes(table)
    ordered = tuple(sorted(results, key=lambda result: result.image_id))
    return Outcomes(ordered, table, matches, causes.cause_P, causes.object_P, causes.found_G)
