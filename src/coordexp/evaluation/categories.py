"""From a free-text description to a category: by exact name, then by normalized name, then by nearest meaning.

A cosine similarity has no natural threshold: the ranges of synonyms and of unrelated names overlap. Therefore the
ranking within the vocabulary decides. The floor only excludes descriptions that are near no category, and a description
whose best category leads by too little stays unmapped, as `ambiguous`. The encoder is never used for names that match
exactly or after normalization.

The defaults (floor .5, lead .05) were tried on COCO's 80 names. Of 25 synonyms 22 are accepted, all correctly (man,
settee and necktie are not); of 15 names of other things 3 are accepted (penguin as bird, anchor as tie, rocket as
airplane).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from coordexp.config.schema import EvalParams
from coordexp.errors import DataError
from coordexp.records.categories import Category, Split, clashing, shown_clash
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.text.meaning import TextEncoder, minilm

MatchedBy = Literal["exact", "normalised", "semantic", "ambiguous", "unmapped"]
MATCHED_BY: tuple[MatchedBy, ...] = get_args(MatchedBy)
NO_CATEGORY = -1  # row of a description without a category in the list


def annotated_categories(results: Iterable[ImageResult]) -> tuple[Category, ...]:
    """The annotated names of some results as categories, for files without a list of categories."""
    names = sorted({gt.desc for result in results for gt in result.gt})
    return tuple(Category(number, name, split=None) for number, name in enumerate(names, 1))


class CategoryIndex:
    """Looks up descriptions in a list of categories, which is sorted by id.

    Raises:
        DataError: the list is empty, or two categories share an id or a normalized name.
    """

    def __init__(self, categories: Iterable[Category]) -> None:
        self.categories: tuple[Category, ...] = tuple(sorted(categories, key=lambda c: c.id))
        if not self.categories:
            raise DataError("The list of categories is empty; expected the categories.json that `convert` writes.")
        self._exact = {c.name: row for row, c in enumerate(self.categories)}
        self._normalised = {normalise_desc(c.name): row for row, c in enumerate(self.categories)}
        if groups := clashing(self.categories):
            raise DataError(
                f"{'; '.join(map(shown_clash, groups))}: a prediction could mean either. Names must be distinct: "
                "rename one, or remove the one that is not annotated."
            )
        if len({c.id for c in self.categories}) < len(self):
            raise DataError(f"Two of the {len(self)} categories share an id; ids must be distinct.")

    def __len__(self) -> int:
        return len(self.categories)

    def lookup(self, desc: str) -> tuple[int, MatchedBy]:
        """The row of the category in `categories` (or NO_CATEGORY), and how it was found."""
        if desc in self._exact:
            return self._exact[desc], "exact"
        row = self._normalised.get(normalise_desc(desc))
        return (NO_CATEGORY, "unmapped") if row is None else (row, "normalised")

    def rows(self, split: Split) -> list[int]:
        """Rows of the categories of one split."""
        return [row for row, category in enumerate(self.categories) if category.split == split]


def map_descriptions(
    descs: Iterable[str], index: CategoryIndex, params: EvalParams, encoder: TextEncoder | None = None
) -> dict[str, tuple[int, MatchedBy]]:
    """For each description the row of its category (or NO_CATEGORY), and how it was found.

    Args:
        descs: the distinct descriptions of a data set.
        index: the categories.
        params: `mapping`, `semantic_floor` and `semantic_margin`.
        encoder: for the semantic mapping; MiniLM by default.

    Raises:
        ConfigError: the mapping is semantic and its encoder is not installed.
    """
    found = {desc: index.lookup(desc) for desc in descs}
    if params.mapping == "exact":
        return {d: hit if hit[1] == "exact" else (NO_CATEGORY, "unmapped") for d, hit in found.items()}
    if params.mapping == "semantic":
        encoder = encoder or minilm()
        unknown = sorted(desc for desc, (row, _) in found.items() if row == NO_CATEGORY and normalise_desc(desc))
        if unknown:
            found |= dict(zip(unknown, _nearest(unknown, index, params, encoder), strict=True))
    return found


def _nearest(
    descs: Sequence[str], index: CategoryIndex, params: EvalParams, encoder: TextEncoder
) -> list[tuple[int, MatchedBy]]:
    names = [normalise_desc(category.name) for category in index.categories]
    vectors = encoder.encode([*names, *(normalise_desc(desc) for desc in descs)])
    cosine_DK = vectors[len(names) :] @ vectors[: len(names)].T
    best_D = cosine_DK.argmax(axis=1)
    top_D2 = np.sort(np.pad(cosine_DK, ((0, 0), (1, 0)), constant_values=-1.0), axis=1)[:, -2:]
    near_D = top_D2[:, 1] >= params.semantic_floor
    leads_D = top_D2[:, 1] - top_D2[:, 0] >= params.semantic_margin
    outcomes: list[tuple[int, MatchedBy]] = []
    for best, near, leads in zip(best_D.tolist(), near_D.tolist(), leads_D.tolist(), strict=True):
        how: MatchedBy = "unmapped" if not near else "semantic" if leads else "ambiguous"
        outcomes.append((best if how == "semantic" else NO_CATEGORY, how))
    return outcomes
