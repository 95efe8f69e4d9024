"""From a free-text description to a category of the data set: exact name first, then normalised name.

Nearest by meaning, for those that neither finds: semantics.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from coordexp.errors import DataError
from coordexp.records.categories import Category, Split, clashing, shown_clash
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import ImageResult

MatchedBy = Literal["exact", "normalised", "semantic", "ambiguous", "unmapped"]
MATCHED_BY: tuple[MatchedBy, ...] = get_args(MatchedBy)
NO_CATEGORY = -1  # row of a description that names no category of the list


def annotated_categories(results: Iterable[ImageResult]) -> tuple[Category, ...]:
    """The names that some results annotate, as categories: for files that come without a list."""
    names = sorted({gt.desc for result in results for gt in result.gt})
    return tuple(Category(number, name) for number, name in enumerate(names, 1))


class CategoryIndex:
    """Looks descriptions up in a list of categories, in the order of their ids.

    Raises:
        DataError: the list is empty, or two categories share an id or a normalised name.
    """

    def __init__(self, categories: Iterable[Category]) -> None:
        self.categories: tuple[Category, ...] = tuple(sorted(categories, key=lambda c: c.id))
        if not self.categories:
            raise DataError("The list of categories is empty; expected the categories.json that `convert` writes.")
        self._exact = {c.name: row for row, c in enumerate(self.categories)}
        self._normalised = {normalise_desc(c.name): row for row, c in enumerate(self.categories)}
        if groups := clashing(self.categories):
            raise DataError(
                f"{'; '.join(map(shown_clash, groups))}: a prediction could mean either. Each name must be distinct; "
                "rename one, or leave the one out that is not annotated."
            )
        if len({c.id for c in self.categories}) < len(self):
            raise DataError(f"Two of the {len(self)} categories share an id; each must be distinct.")

    def __len__(self) -> int:
        return len(self.categories)

    def lookup(self, desc: str) -> tuple[int, MatchedBy]:
        """Return the row of the category in `categories` (or NO_CATEGORY) and how it was found."""
        if desc in self._exact:
            return self._exact[desc], "exact"
        row = self._normalised.get(normalise_desc(desc))
        return (NO_CATEGORY, "unmapped") if row is None else (row, "normalised")

    def rows(self, split: Split) -> list[int]:
        """Rows of the categories of one split."""
        return [row for row, category in enumerate(self.categories) if category.split == split]
