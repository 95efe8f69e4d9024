"""The common form of all source formats: images with their annotations as in the file, not yet checked.

A reader handles only its format. `records.policy` decides for all formats what to keep.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from coordexp.config.formats import BoxForm
from coordexp.geometry.boxes import Box
from coordexp.infra.workers import map_batches
from coordexp.records.categories import Category
from coordexp.records.image_files import IMAGE_SUFFIXES, files_below
from coordexp.records.images import unsafe_name
from coordexp.records.schema import is_area_px2
from coordexp.records.shards import find_source

# float() would also accept "nan", "inf" and "1_0".
_PERCENT = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_PLAIN_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")


@dataclass(frozen=True, slots=True)
class Problem:
    """A dropped item: the reason, the file, and its id in the file."""

    reason: str
    file: str
    key: str
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.file}: {self.key}: {self.reason}" + (f" ({self.detail})" if self.detail else "")
        return text.encode("utf-8", "backslashreplace").decode()  # JSON can contain unpaired surrogates


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One annotation. `box_xyxy` is None if the file has no valid box."""

    desc: Any
    box_xyxy: Box | None  # in pixels, or relative to the image side, see `side_units`
    key: str  # its id in the file, for messages
    iscrowd: bool | None = False  # a crowd region or difficult object; None: the value in the file is invalid
    truncated: bool = False  # the source marks it as extending outside the image or behind another object
    rings: tuple[tuple[float, ...], ...] = ()  # polygons [x1, y1, x2, y2, ...]
    side_units: float | None = None  # length of an image side: 1 for fractions, 1000 for thousandths; None: pixels
    has_size: bool = False  # the file has x, y, width, height; otherwise corners, a center or an outline
    counts_from: int = 0  # index of the first pixel in the format; the box is already counted from 0
    category_id: int | None = None  # in the file; None if it has only names
    problem: str = ""  # the drop reason, if the reader knows it already
    found: str = ""  # the content of the file if it is invalid, for messages
    area_px2: Any = None  # of its mask; None if not in the file
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image, or one prompt for an image, with its annotations."""

    file_name: Any  # relative to the root of the set
    key: str
    image_id: int | None  # number in the source; None if there is none, or if one image yields several records
    width: Any  # as annotated; None if the format has no size
    height: Any
    objects: tuple[SourceObject, ...]
    file: str  # the annotation file, for messages
    metadata: dict[str, Any] = field(default_factory=dict)
    problem: str = ""  # the reason why its objects are unknown, which makes the record unusable
    detail: str = ""  # of the problem


Parsed = SourceImage | Problem | None


def _itself(entry: Any) -> Parsed:
    return entry


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of a reader.

    Attributes:
        entries: one entry per image, in the form that is cheap to produce: a file, a piece of text, or a whole image. A
            file is read sequentially, so they can be iterated only once.
        categories: the categories that the annotations declare.
        problems: of the annotations as a whole; complete after `entries` is exhausted.
        parse: turns an entry into an image, a problem, or None if it belongs to another split. It takes most of the
            time, so several processes may share the entries.
    """

    entries: Iterable[Any]
    categories: tuple[Category, ...]
    problems: list[Problem]
    parse: Callable[[Any], Parsed] = _itself

    @property
    def images(self) -> Iterator[SourceImage]:
        """Every image; entries that are not images are added to `problems`."""
        for entry in self.entries:
            found = self.parse(entry)
            if isinstance(found, SourceImage):
                yield found
            elif found:
                self.problems.append(found)

    def with_boxes(self, form: BoxForm) -> Reading:
        """The same reading, with box numbers interpreted in another form than that of the format."""
        if form == "format":
            return self

        def parse(entry: Any) -> Parsed:
            found = self.parse(entry)
            if not isinstance(found, SourceImage):
                return found
            return replace(found, objects=tuple(_with_box(o, form) for o in found.objects))

        return replace(self, parse=parse)

    def loaded(self) -> tuple[Reading, set[str]]:
        """The same reading with all images in memory, and the names of their files."""
        images = list(self.images)
        return Reading(images, self.categories, self.problems), {str(image.file_name) for image in images}

    def image_names(self, workers: int) -> set[str]:
        """The image files in the annotations, collected by this number of processes."""

        def of_batch(entries: list[Any]) -> set[str]:
            return {str(image.file_name) for image in replace(self, entries=entries).images}

        return set().union(*map_batches(of_batch, self.entries, workers))


UNITS: dict[BoxForm, float | None] = {"pixels": None, "fractions": 1.0, "thousandths": 1000.0}


def _with_box(obj: SourceObject, form: BoxForm) -> SourceObject:
    if form in UNITS:
        return replace(obj, side_units=UNITS[form])
    if obj.box_xyxy is None:
        return obj
    x1, y1, x2, y2 = obj.box_xyxy
    if form == "corners":  # the format's x, y, width, height have become x, y, x + width, y + height
        if not obj.has_size:
            return obj
        return replace(obj, box_xyxy=(x1, y1, x2 - x1, y2 - y1))
    return replace(obj, box_xyxy=(x1 + obj.counts_from, y1 + obj.counts_from, x2, y2), counts_from=0)


@dataclass(frozen=True, slots=True)
class SplitFiles:
    """The location of one split. `annotations` and `images` are relative to `root`; `split` is "train" or "val".

    Without `polygons`, a reader may skip them: in a COCO file they are most of the bytes.
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
        """Make a file name that is relative to the image folder relative to the root; other values are unchanged."""
        if not isinstance(name, str) or self.images in ("", "."):
            return name
        return f"{self.images.rstrip('/')}/{name}"


class ImageNames:
    """Finds the images of a split from their names in annotations.

    Some programs write names that differ from the file names: with backslashes or percent-encoding, with folders of
    another machine, with accents in another Unicode form, or with another suffix. Such a name is resolved if exactly
    one file matches.
    """

    def __init__(self, files: SplitFiles) -> None:
        self.files = files
        self._stems: dict[str, dict[str, str]] = {}  # folder -> stem -> name, both relative to the root

    def find(self, name: object) -> object:
        """The file name relative to the root of the set; as `SplitFiles.image_name` if no file or several match."""
        plain = self.files.image_name(name)
        if not isinstance(name, str) or not isinstance(plain, str) or self.exists(plain):
            return plain
        if ".." in name.replace("\\", "/").split("/"):  # leaves the image folder
            return plain
        candidates = [self.files.image_name(c) for c in dict.fromkeys(self._other_spellings(name))]
        named = (str(c) for c in candidates if self.exists(str(c)))
        stems = (found for c in candidates if (found := self.of_stem(str(c).rsplit(".", 1)[0])))
        return next(named, None) or next(stems, plain)

    def of_stem(self, name: str) -> str | None:
        """The single image with this name and any suffix; both relative to the root."""
        if unsafe_name(name):
            return None
        folder, _, stem = name.rpartition("/")
        if folder not in self._stems:
            place = self.files.root / folder
            listed = sorted(p.name for p in place.iterdir()) if os.path.isdir(place) else []
            names = [n for n in listed if Path(n).suffix.lower() in IMAGE_SUFFIXES]
            self._stems[folder] = _unique((_plain(Path(n).stem), f"{folder}/{n}" if folder else n) for n in names)
        return self._stems[folder].get(_plain(stem)) or None

    def all(self) -> list[str]:
        """All images in the image folder, relative to the root, sorted."""
        found = (p for p in files_below(self.files.root / self.files.images) if p.suffix.lower() in IMAGE_SUFFIXES)
        return sorted(p.relative_to(self.files.root).as_posix() for p in found)

    def exists(self, name: str) -> bool:
        """Whether this name, relative to the root, exists."""
        if unsafe_name(name):
            return False
        source = find_source(self.files.root, name)
        return not isinstance(source, Path) or os.path.exists(source)  # also False for an impossible path

    def _other_spellings(self, name: str) -> Iterator[str]:
        slashed = name.replace("\\", "/")
        is_absolute = slashed.startswith("/") or slashed[1:2] == ":"
        folder = (self.files.root / self.files.images).name
        for text in (slashed, _PERCENT.sub(_decoded, slashed)):
            for form in ("NFC", "NFD"):
                parts = [part for part in unicodedata.normalize(form, text).split("/") if part not in ("", ".", "..")]
                for i in range(len(parts)):
                    # Without folders of another machine, or folders that the image folder already includes.
                    if i == 0 or is_absolute or parts[i - 1] == folder:
                        yield "/".join(parts[i:])


def _decoded(found: re.Match[str]) -> str:
    """Decode percent-encoded characters."""
    return bytes.fromhex(found[0].replace("%", "")).decode("utf-8", errors="replace")


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Key -> value; empty for keys with several values."""
    found: dict[str, str] = {}
    for key, value in pairs:
        found[key] = value if found.get(key, value) == value else ""
    return found


class Reader(Protocol):
    """Reads one split of one format.

    Raises:
        DataError: the file is missing or does not have this format; single invalid entries become problems instead.
    """

    def __call__(self, files: SplitFiles) -> Reading:
        """Read the split."""
        ...


def corners_of_xywh(values: Any) -> Box | None:
    """[x, y, width, height] as corners; None unless it is four finite numbers, possibly written as text."""
    if (box := corners(values)) is None:
        return None
    x, y, w, h = box
    return x, y, x + w, y + h


def corners(values: Any) -> Box | None:
    """[x1, y1, x2, y2]; None unless it is four finite numbers, possibly written as text."""
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
    """Whether a value is a finite number; true and false are not."""
    # A tuple, because `int | float` would be built again for each of a million numbers.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def as_area_px2(value: Any) -> float | None:
    """An annotated area, possibly written as text; None if it cannot be the area of an object."""
    number = as_number(value)
    return number if number is not None and is_area_px2(number) else None


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, including 3.0 as spreadsheets write it."""
    return is_finite(value) and float(value).is_integer()


def as_number(value: Any) -> float | None:
    """A finite number, possibly written as text; None for anything else."""
    if isinstance(value, str) and _PLAIN_NUMBER.fullmatch(value):
        value = float(value)
    return float(value) if is_finite(value) else None


def as_whole(value: Any) -> int | None:
    """An integer such as an id, possibly written as 3.0 or as text; None for anything else."""
    if type(value) is int:  # the common case: files have millions of ids
        return value
    number = as_number(value)
    return int(number) if number is not None and number.is_integer() else None
