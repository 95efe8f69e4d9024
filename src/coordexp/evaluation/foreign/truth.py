"""Annotations for the evaluation: COCO or LVIS instances, a YOLO data.yaml, records, or a gt_vs_pred file.

All annotations of a file are used. Policies such as dropping tiny boxes belong to training, not to numbers that are
compared with those of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.errors import DataError
from coordexp.evaluation.categories import annotated_categories
from coordexp.evaluation.lvis import FederatedLabels, federated_from, federated_of
from coordexp.geometry.boxes import Box
from coordexp.infra.foreign import Gate
from coordexp.records.categories import Category
from coordexp.records.convert import convert_file
from coordexp.records.gt_vs_pred import LARGEST_PX, GroundTruth, read_results
from coordexp.records.schema import Record, checked_area_px2, checked_flag, read_records

ANNOTATIONS = Gate(
    "annotations of a data set", DataError, "Give the annotations of the predicted images.", max_bytes=1 << 32
)
EXPECTED = (
    "expected COCO or LVIS instances (.json), records or gt_vs_pred lines (.jsonl), or a YOLO data.yaml; convert other "
    "formats to records with `coordexp convert`"
)


@dataclass(frozen=True, slots=True)
class TruthImage:
    """One annotated image; boxes are float pixels xyxy."""

    image_id: int
    image: str
    width: int
    height: int
    gt: tuple[GroundTruth, ...]


@dataclass(frozen=True, slots=True)
class Truth:
    """The annotations of a data set, its categories in the order of their ids, and LVIS's labels if it has them."""

    path: Path
    images: tuple[TruthImage, ...]
    categories: tuple[Category, ...]
    federated: FederatedLabels | None = None
    _ids: frozenset[int] = field(init=False, repr=False)
    _by_name: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", frozenset(image.image_id for image in self.images))
        object.__setattr__(self, "_by_name", _names(self.images))

    @property
    def sizes_wh_px(self) -> dict[int, tuple[int, int]]:
        """Image id -> width and height."""
        return {image.image_id: (image.width, image.height) for image in self.images}

    def image_id(self, key: object, where: str) -> int:
        """The id of the image that an id, a path, a file name or its stem means.

        Raises:
            DataError: there is no such image, or several have this name.
        """
        if isinstance(key, str):
            name = key.replace("\\", "/")
            for candidate in (name, PurePosixPath(name).name, PurePosixPath(name).stem):
                if (found := self._by_name.get(candidate)) is not None:
                    if found < 0:
                        raise DataError(
                            f"{where}: several images of {self.path} are called {candidate!r}; use their ids."
                        )
                    return found
            key = int(key) if key.isdecimal() else key
        if isinstance(key, int) and not isinstance(key, bool) and key in self._ids:
            return key
        known = ", ".join(repr(image.image) for image in self.images[:3])
        raise DataError(
            f"{where}: image {key!r} is not in {self.path}, which holds {len(self.images)} images such as {known}. "
            "Use the annotations of the split of the predictions."
        )


def _names(images: Sequence[TruthImage]) -> dict[str, int]:
    """Path, file name and stem -> image id; -1 if several images share one."""
    forms = [{image.image, PurePosixPath(image.image).name, PurePosixPath(image.image).stem} - {""} for image in images]
    times = Counter(chain.from_iterable(forms))
    full = Counter(image.image for image in images)
    names: dict[str, int] = {}
    for image, own in zip(images, forms, strict=True):
        for name in own:
            names[name] = image.image_id if times[name] == 1 else -1
    for image in images:  # a full path takes precedence over a file name
        names[image.image] = image.image_id if full[image.image] == 1 else -1
    return names


def read_truth(path: Path) -> Truth:
    """Read the annotations of a data set.

    Raises:
        DataError: the file has another format, or an invalid image, box, area or flag; the message names the location.
    """
    if path.suffix in {".yaml", ".yml"}:
        converted = convert_file("yolo", path, path.parent, "val")
        return _of_records(path, converted.splits["val"])
    if path.suffix == ".jsonl":
        return _of_lines(path)
    return _of_instances(path, ANNOTATIONS.read_json(path))


def _of_lines(path: Path) -> Truth:
    with path.open(encoding="utf-8", errors="replace") as lines:
        is_result = '"pred"' in next(lines, "")
    if not is_result:
        return _of_records(path, list(read_records(path)))
    results = list(read_results(path))
    images = tuple(TruthImage(r.image_id, r.image, r.width, r.height, r.gt) for r in results)
    return Truth(path, images, annotated_categories(results))


def _of_records(path: Path, records: Sequence[Record]) -> Truth:
    """Records without ids are numbered in order."""
    names = sorted({o.desc for record in records for o in record.objects})
    categories = tuple(Category(number, name, split=None) for number, name in enumerate(names, 1))
    images = tuple(_of_record(record, number) for number, record in enumerate(records, 1))
    return Truth(path, _with_ids(images, str(path)), categories, federated_of(records, categories))


def _of_record(record: Record, number: int) -> TruthImage:
    objects = [GroundTruth(o.desc, o.bbox_xyxy_px, bool(o.metadata.get("iscrowd")), o.area_px2) for o in record.objects]
    image_id = int(record.metadata.get("image_id", number))
    return TruthImage(image_id, record.image, record.width, record.height, tuple(objects))


def _of_instances(path: Path, source: Any) -> Truth:
    """COCO's instances layout, as pycocotools reads it: every annotation counts, with its annotated `area`."""
    if not isinstance(source, dict) or not all(isinstance(source.get(k), list) for k in _INSTANCES_KEYS):
        found = f"a {type(source).__name__}" if not isinstance(source, dict) else f"the keys {sorted(source)[:8]}"
        raise DataError(f"{path}: found {found}; {EXPECTED}.")
    where = f"{path}: "
    names: dict[int, str] = {}
    for n, row in enumerate(source["categories"]):
        names[_int(row, "id", f"{where}categories[{n}]")] = _text(row, "name", f"{where}categories[{n}]")
    objects: dict[int, list[GroundTruth]] = {}
    images: list[tuple[int, str, int, int]] = []
    for n, row in enumerate(source["images"]):
        at = f"{where}images[{n}]"
        image_id = _int(row, "id", at)
        name = row.get("file_name") or row.get("coco_url") or str(image_id)
        images.append((image_id, str(name), _int(row, "width", at), _int(row, "height", at)))
        objects[image_id] = []
    for n, row in enumerate(source["annotations"]):
        at = f"{where}annotations[{n}]"
        image_id, category = _int(row, "image_id", at), _int(row, "category_id", at)
        if image_id not in objects or category not in names:
            what = f"image {image_id}" if image_id not in objects else f"category {category}"
            raise DataError(f"{at}: {what} is not in the file's own list.")
        objects[image_id].append(_ground_truth(row, names[category], at))
    found_images = tuple(TruthImage(*row, tuple(objects[row[0]])) for row in images)
    categories = tuple(
        Category(int(row["id"]), names[int(row["id"])], None, row.get("frequency")) for row in source["categories"]
    )
    is_lvis = any("neg_category_ids" in image for image in source["images"])
    federated = federated_from(source, str(path)) if is_lvis else None
    return Truth(path, _with_ids(found_images, str(path)), categories, federated)


_INSTANCES_KEYS = ("images", "annotations", "categories")


def _ground_truth(row: Mapping[str, Any], name: str, where: str) -> GroundTruth:
    crowd = checked_flag(row.get("iscrowd", 0), f"{where}.iscrowd")
    return GroundTruth(name, xywh_box(row.get("bbox"), where), crowd, checked_area_px2(row.get("area"), where))


def xywh_box(value: Any, where: str) -> Box:
    """A COCO box as float pixels xyxy; raises DataError unless it is four finite numbers with nonnegative sides."""
    try:
        x, y, w, h = (float(v) for v in value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: bbox {value!r}, expected [x, y, width, height] in pixels.") from error
    return xyxy_box((x, y, x + w, y + h), where)


def xyxy_box(values: Any, where: str) -> Box:
    """A box as float pixels xyxy; raises DataError unless it is four finite, ordered numbers within LARGEST_PX."""
    try:
        x1, y1, x2, y2 = (float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: box {values!r}, expected [x1, y1, x2, y2] in pixels.") from error
    inside = all(abs(v) < LARGEST_PX for v in (x1, y1, x2, y2))  # False for NaN and infinity, too
    if not inside or x2 < x1 or y2 < y1:
        raise DataError(f"{where}: box {values!r}, expected finite pixels with x2 >= x1 and y2 >= y1.")
    return x1, y1, x2, y2


def _with_ids(images: tuple[TruthImage, ...], where: str) -> tuple[TruthImage, ...]:
    times = Counter(image.image_id for image in images)
    if not images:
        raise DataError(f"{where}: no image, expected at least one.")
    if twice := [image_id for image_id, n in times.items() if n > 1]:
        raise DataError(f"{where}: image id {twice[0]} appears {times[twice[0]]} times, expected once.")
    return images


def _int(row: Any, key: str, where: str) -> int:
    value = row.get(key) if isinstance(row, Mapping) else None
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where}: {key} is {value!r}, expected an integer.")
    return value


def _text(row: Any, key: str, where: str) -> str:
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} is {value!r}, expected a text.")
    return value
