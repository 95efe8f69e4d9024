"""Small COCO folders of generated pictures, with the oddities of real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coordexp.config.profile import DatasetConfig, RecordsConfig

NAMES = ("person", "traffic light", "cat", "red mug")


def picture(index: int, width: int = 64, height: int = 48) -> Image.Image:
    """Smooth colours that differ from index to index."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(index)
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.02, 0.3, (3, 3))]
    return Image.fromarray(np.stack([127 + 120 * w for w in waves], -1).astype(np.uint8))


def annotation(number: int, image_id: int, category_id: int = 1, bbox: Any = None, **more: Any) -> dict[str, Any]:
    box = [4 + number % 20, 5, 20, 18] if bbox is None else bbox
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "iscrowd": 0, **more}


def instances(images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    categories = [{"id": i, "name": name, "supercategory": "thing"} for i, name in enumerate(NAMES, 1)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def write_split(root: Path, split: str, first: int, count: int, extra: Sequence[dict[str, Any]] = ()) -> None:
    """`count` pictures with ids first, first + 1, ...; each with two objects of two names, plus `extra` annotations."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], list(extra)
    for image_id in range(first, first + count):
        name = f"{image_id:012d}.jpg"
        picture(image_id).save(root / split / name)
        images.append({"id": image_id, "file_name": name, "width": 64, "height": 48})
        for i in range(2):
            category = 1 + (image_id + i) % 3
            annotations.append(annotation(image_id * 10 + i, image_id, category, [2 + 9 * i, 3 + i, 20, 25]))
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(instances(images, annotations)), encoding="utf-8")


def edit(root: Path, split: str, **changes: Any) -> None:
    """Change sections of an instances file: a function of the old value, or the new one."""
    path = root / "annotations" / f"instances_{split}.json"
    source = json.loads(path.read_text(encoding="utf-8"))
    for section, change in changes.items():
        source[section] = change(source[section]) if callable(change) else change
    path.write_text(json.dumps(source), encoding="utf-8")


def coco_set(root: Path, **changes: Any) -> DatasetConfig:
    keys = {
        "format": "coco", "root": str(root), "train": "annotations/instances_train2017.json",
        "val": "annotations/instances_val2017.json", "train_images": "train2017", "val_images": "val2017",
        "weight": 1.0, "prompt": "open",
    }  # fmt: skip
    return DatasetConfig(**(keys | changes))


def records_config(**changes: Any) -> RecordsConfig:
    keys = {
        "dev_images": 2, "crowd": "ignore", "truncated": "keep", "min_side_px": 1.0, "min_inside": 0.0,
        "polygons": "drop", "max_objects": 0, "over_max": "sample", "bad_images": "error", "overlap": "error",
        "max_lost": 1.0, "listed_names": 3, "negative_rate": 0.0, "flip": 0.0, "crop": 0.0,
        "scale_jitter": 0.0,
    }  # fmt: skip
    return RecordsConfig(**(keys | changes))
