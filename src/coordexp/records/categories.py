"""The categories of a data set, and their file: [{"id": 1, "name": "cat", "split": "train" | "held_out" | ...}, ...].

`split` is `train` for category names that occur in training. The others are held out, at several levels:
`strict`: unseen in text and images of any training; `phrase`: in images of pretraining, but unseen in text;
`plain_only`: training has one of the words (the noun without its attribute); `never`: training has no word of the name.

LVIS also defines the frequency of a category in its training images: "r" in at most 10, "c" in at most 100, else "f".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from coordexp.errors import DataError
from coordexp.infra.foreign import Gate, shown
from coordexp.records.descriptions import normalise_desc

Split = Literal["train", "held_out", "strict", "phrase", "plain_only", "never"]
Frequency = Literal["r", "c", "f"]
CATEGORIES = Gate("a categories.json, as `convert` writes it", DataError, "Convert again, or name another file.")


@dataclass(frozen=True, slots=True)
class Category:
    """One category of the data set; all splits except `train` are held out of training. None: not specified."""

    id: int
    name: str
    split: Split | None = "train"
    frequency: Frequency | None = None
    aliases: tuple[str, ...] = ()  # other spellings in the sources
    is_root: bool = False  # parent of other categories in the source, as in exports with one group of classes

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value, without keys that the source does not have."""
        row: dict[str, Any] = {"id": self.id, "name": self.name}
        row |= {"split": self.split} if self.split else {}
        row |= {"frequency": self.frequency} if self.frequency else {}
        return row | ({"aliases": list(self.aliases)} if self.aliases else {})


def as_split(value: object) -> Split | None:
    """The split with this name; None if there is none."""
    splits: tuple[Split, ...] = get_args(Split)
    return next((split for split in splits if split == value), None)


def clashing(categories: Iterable[Category]) -> list[tuple[Category, ...]]:
    """Groups of categories with the same normalized name: a prediction could mean any of a group."""
    groups: defaultdict[str, list[Category]] = defaultdict(list)
    for category in categories:
        groups[normalise_desc(category.name)].append(category)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def shown_clash(group: Iterable[Category]) -> str:
    """Describe a group of `clashing` for messages."""
    listed = " and ".join(f"{c.id} {c.name!r}" for c in group)
    return f"categories {listed} have the same name (case, '_' and parentheses are ignored)"


def read_categories(path: Path) -> tuple[Category, ...]:
    """Read categories.json.

    Raises:
        DataError: an entry is invalid; the message names it.
    """
    rows = CATEGORIES.read_json(path)
    if not isinstance(rows, list):
        CATEGORIES.refuse(str(path), f"found {shown(rows)}, not a list")
    return tuple(_category(row, f"{path}: entry {number}") for number, row in enumerate(rows))


def _category(row: object, where: str) -> Category:
    frequency = row.get("frequency") if isinstance(row, dict) else None
    if frequency in (None, "r", "c", "f"):
        match row:
            case {"id": int(id_), "name": str(name), "split": str(split)} if name.strip() and as_split(split):
                return Category(id_, name, as_split(split), frequency)
            case {"id": int(id_), "name": str(name), **rest} if name.strip() and "split" not in rest:
                return Category(id_, name, None, frequency)
    raise DataError(
        f"{where} is {shown(row)}, expected an integer id, a name, split {', '.join(get_args(Split))}, "
        "frequency r, c or f."
    )
