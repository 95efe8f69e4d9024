"""What every source format becomes first: images with annotations as the file gives them, nothing checked yet.

A reader only knows its format. What may be kept is decided once, for all formats, in `records.policy`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.records.categories import Category
from coordexp.records.schema import is_area_px2

# float() would take "nan", "inf" and "1_0" as well.
_PLAIN_NUMBER = re.compile(r"\s*[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?\s*")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that was not kept: why, in which file, under which id there."""

    reason: str
    file: str
    key: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One annotation. `box_xyxy` is None where the file holds nothing of that form."""

    desc: Any
    box_xyxy: Box | None  # pixels; fractions of width and height if `in_unit_frame`
    key: str  # its id in the file, for messages
    iscrowd: bool | None = False  # a crowd, or what the source calls difficult; None: the file says neither yes nor no
    truncated: bool = False  # the source says that the object goes on outside the image or behind another
    rings: tuple[tuple[float, ...], ...] = ()  # polygons [x1, y1, x2, y2, ...]
    in_unit_frame: bool = False
    category_id: int | None = None  # of the file; None where it has only names
    found: str = ""  # what stands in the file where something of this is not understood, for messages
    area_px2: Any = None  # of its mask; None where the file says nothing
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image, or one question about an image, with its annotations."""

    file_name: Any  # relative to the root of the set
    key: str
    image_id: int | None  # the source's number; None where it has none, or where one image gives several records
    width: Any  # as annotated; None where the format has no size
    height: Any
    objects: tuple[SourceObject, ...]
    file: str  # the annotation file, for messages
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader found. `problems` is complete once `images` was iterated to its end."""

    images: Iterable[SourceImage]
    categories: tuple[Category, ...]
    problems: list[Problem]

    def loaded(self) -> tuple[Reading, set[str]]:
        """The same with all images in memory, and the names of their files."""
        images = list(self.images)
        return Reading(images, self.categories, self.problems), {str(image.file_name) for image in images}


@dataclass(frozen=True, slots=True)
class SplitFiles:
    """Where one split of a set lies. `annotations` and `images` are relative to `root`; `split` is "train" or "val".

    Without `polygons` a reader may leave them out: in COCO's file they are most of the bytes.
    """

    root: Path
    annotations: str
    images: str
    split: str
    polygons: bool = True

    @property
    def path(self) -> Path:
        """The annotation file."""
        return self.root / self.annotations

    def image_name(self, name: object) -> object:
        """A file name relative to the image folder, made relative to the root; other values stay as they are."""
        if not isinstance(name, str) or self.images in ("", "."):
            return name
        return f"{self.images.rstrip('/')}/{name}"


class Reader(Protocol):
    """Reads one split of one format.

    Raises:
        DataError: the file is missing or is not of this format at all; single broken entries are problems instead.
    """

    def __call__(self, files: SplitFiles) -> Reading:
        """Read the split."""
        ...


def corners_of_xywh(values: Any) -> Box | None:
    """[x, y, width, height] as corners, or None if it is not four finite numbers, which may be written as text."""
    if (box := corners(values)) is None:
        return None
    x, y, w, h = box
    return x, y, x + w, y + h


def corners(values: Any) -> Box | None:
    """[x1, y1, x2, y2] checked for four finite numbers, which may be written as text."""
    if not isinstance(values, list | tuple) or len(values) != 4:
        return None
    if not all(map(is_finite, values)):
        values = [as_number(v) for v in values]
        if None in values:
            return None
    return float(values[0]), float(values[1]), float(values[2]), float(values[3])


def around(points: Sequence[float]) -> Box:
    """The tight box around points given as x1, y1, x2, y2, ..."""
    xs, ys = points[::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def is_finite(value: Any) -> bool:
    """A finite number; true and false are none."""
    # A tuple: `int | float` would be built for each of a file's million numbers.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def as_area_px2(value: Any) -> float | None:
    """An annotated area, also one written as text; None if it cannot be the area of an object."""
    number = as_number(value)
    return number if number is not None and is_area_px2(number) else None


def is_whole(value: Any) -> bool:
    """A whole number, also one that a table program wrote as 3.0."""
    return is_finite(value) and float(value).is_integer()


def as_number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, str) and _PLAIN_NUMBER.fullmatch(value):
        value = float(value)
    return float(value) if is_finite(value) else None


def as_whole(value: Any) -> int | None:
    """A whole number such as an id, also one written as 3.0 or as text; None for anything else."""
    if type(value) is int:  # nearly always: files hold a million of them
        return value
    number = as_number(value)
    return int(number) if number is not None and number.is_integer() else None


def read_json(path: Path, expected: str, on_object: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Any:
    """The value of a JSON file; `on_object` may change each of its objects as it comes.

    Raises:
        DataError: naming the file, the line and what was expected.
    """

    refuse_pickle(path)
    if not path.is_file():
        raise DataError(f"{path}: not found; expected {expected}.")
    try:
        return json.loads(path.read_bytes(), object_hook=on_object)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); expected {expected}.") from error
    except ValueError as error:  # not UTF-8, or a number beyond what Python reads
        raise DataError(f"{path}: not JSON in UTF-8 ({error}); expected {expected}.") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply to be annotations; expected {expected}.") from error


def read_text(path: Path, expected: str) -> str:
    """The text of a file in UTF-8, without the byte-order mark that some editors put first.

    Raises:
        DataError: naming the file and what was expected.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); expected {expected}.") from error


def refuse_pickle(path: Path) -> None:
    """Raise DataError for a pickle, by its name: loading one runs whatever code it holds."""
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise DataError(
            f"{path}: pickles are not read, because loading one can run code. Use the JSON form or the Hugging Face "
            "parquet form of the same annotations (docs/data.md says which)."
        )
