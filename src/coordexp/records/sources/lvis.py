"""LVIS v1: COCO's layout without file names, and federated labels.

Annotators searched an image only for its annotated categories and for those in `neg_category_ids` (verified absent).
Categories in `not_exhaustive_category_ids` may have more instances. Both are stored in the record's metadata, as names,
so that prompts list only known names and evaluation can ignore the rest (Gupta et al. 2019, arXiv:1908.03195).

LVIS val contains images of COCO's train2017: the path comes from `coco_url`, below the image folder of the set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from coordexp.records.categories import Frequency
from coordexp.records.sources.base import Reading, SplitFiles
from coordexp.records.sources.coco import ImageRow, as_id, instances_reading, load_instances


def read(files: SplitFiles) -> Reading:
    """Read LVIS v1; the image folder contains `train2017` and `val2017`."""
    instances = load_instances(files.path, names_images=False, polygons=files.polygons)
    for row in instances.rows.values():
        row["name"] = spoken_name(str(row["name"]))
    categories = (
        replace(c, name=spoken_name(c.name), frequency=frequency_of(row))
        for c, row in zip(instances.categories, instances.rows.values(), strict=True)
    )
    named = replace(instances, categories=tuple(categories))

    def names(image: ImageRow, key: str) -> list[str]:
        listed = image.get(key)
        ids = map(as_id, listed if isinstance(listed, list) else [])
        return sorted(named.name_of(i) for i in ids if i in named.rows)

    def metadata(image: ImageRow) -> dict[str, Any]:
        return {
            "absent": names(image, "neg_category_ids"),
            "not_exhaustive": names(image, "not_exhaustive_category_ids"),
        }

    return instances_reading(named, lambda image: files.image_name(_path(image)), metadata)


def spoken_name(name: str) -> str:
    """ "bow_(weapon)" -> "bow (weapon)"."""
    return name.replace("_", " ")


def frequency_of(row: dict[str, Any]) -> Frequency | None:
    """Frequency of a category in the training images of LVIS; None if the file has no valid value."""
    found = row.get("frequency")
    return found if found in get_args(Frequency) else None


def _path(image: ImageRow) -> object:
    """`http://images.cocodataset.org/train2017/000000391895.jpg` -> `train2017/000000391895.jpg`."""
    url = image.get("coco_url")
    return "/".join(url.split("/")[-2:]) if isinstance(url, str) and url.count("/") >= 2 else image.file_name
