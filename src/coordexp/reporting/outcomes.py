"""What became of every box of one checkpoint, by the matching that the F1 metrics use.

Legend: G annotated objects, P predictions, M matched pairs; rows as in the DetectionTable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from coordexp.config.schema import EvalParams
from coordexp.evaluation.categories import NO_CATEGORY
from coordexp.evaluation.f1 import GreedyMatches, match_greedily
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.table import Bools, DetectionTable, Ints, build_table, image_slices
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult

MATCH_IOU = 0.5  # a box is right from here on
LOWEST_IOU = 0.3  # pairs below it are not looked at
UNKNOWN_NAME = "(other name)"


class Fate(IntEnum):
    """What a prediction turned out to be."""

    FALSE = 0  # no object there
    WRONG_NAME = 1  # an object is there, and is called something else; counts as false
    RIGHT = 2


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Every prediction's fate and every object's discovery, at IoU 0.5."""

    results: tuple[ImageResult, ...]  # by image id
    table: DetectionTable
    matches: GreedyMatches
    fate_P: Ints
    true_name_P: tuple[str | None, ...]  # what the matched object is called
    found_G: Bools  # matched by a box of the right name

    def of_image(self, image_id: int) -> tuple[ImageResult, slice, slice]:
        """The image's result and the rows of its predictions and objects."""
        image = int(np.searchsorted(self.table.image_ids_I, image_id))
        n = self.table.n_images
        return (
            self.results[image],
            image_slices(self.table.pred_image_P, n)[image],
            image_slices(self.table.gt_image_G, n)[image],
        )

    def confusions(self) -> Counter[tuple[str, str]]:
        """(annotated name, predicted name) -> pairs matched at IoU 0.5 with the wrong name."""
        names = [category.name for category in self.table.index.categories]
        hit_M = self.matches.at(MATCH_IOU) & ~self.matches.same_name_M
        pairs: Counter[tuple[str, str]] = Counter()
        for pred, gt in zip(self.matches.pred_M[hit_M].tolist(), self.matches.gt_M[hit_M].tolist(), strict=True):
            predicted = int(self.table.pred_category_P[pred])
            name = UNKNOWN_NAME if predicted == NO_CATEGORY else names[predicted]
            pairs[names[self.table.gt_category_G[gt]], name] += 1
        return pairs

    def named_right(self) -> Counter[str]:
        """Annotated name -> objects matched at IoU 0.5 with the right name."""
        names = [category.name for category in self.table.index.categories]
        return Counter(names[category] for category in self.table.gt_category_G[self.found_G].tolist())


def judge(results: Sequence[ImageResult], categories: Sequence[Category], params: EvalParams = STANDARD) -> Outcomes:
    """Match the predictions of one checkpoint, names mapped as `params` say.

    Raises:
        DataError: the results break their contract.
    """
    table = build_table(results, categories, params)
    matches = match_greedily(table, LOWEST_IOU)
    at_half_M = matches.at(MATCH_IOU)
    fate_P = np.full(len(table.pred_image_P), Fate.FALSE, dtype=np.int64)
    fate_P[matches.pred_M[at_half_M]] = np.where(matches.same_name_M[at_half_M], Fate.RIGHT, Fate.WRONG_NAME)
    found_G = np.zeros(len(table.gt_image_G), dtype=bool)
    found_G[matches.gt_M[at_half_M & matches.same_name_M]] = True
    true_name: list[str | None] = [None] * len(fate_P)
    for pred, gt in zip(matches.pred_M[at_half_M].tolist(), matches.gt_M[at_half_M].tolist(), strict=True):
        true_name[pred] = table.index.categories[table.gt_category_G[gt]].name
    ordered = tuple(sorted(results, key=lambda result: result.image_id))
    return Outcomes(ordered, table, matches, fate_P, tuple(true_name), found_G)
