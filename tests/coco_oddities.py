"""A COCO folder of 60 generated images in the layout of COCO 2017, with every oddity of the real files.

Sizes, colour modes and EXIF turns; run-length crowds, polygons of several rings, float boxes, boxes that touch or cross
the border, boxes without area, categories with gaps in their ids or without annotations, images without annotations, an
image that is annotated as if its EXIF turn did not exist.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from records_folders import picture

TRAIN, VAL = 48, 12
SIZES = ((96, 64), (64, 96), (80, 80), (120, 56))
# COCO's own ids, which have gaps. Nothing is annotated as the last one.
CATEGORIES = {1: "person", 3: "car", 13: "stop sign", 44: "bottle", 90: "toothbrush"}
# Losses that this folder must have, by split and reason; every other one would be unexplained.
LOSSES = {
    "train": {"bbox_too_thin": 2, "image_exif_rotated": 1},
    "val": {"bbox_too_thin": 2},
}
GRAYSCALE, CMYK, UPRIGHT_BY_EXIF, TURNED_BY_EXIF, EMPTY = 2, 3, 4, 5, 6  # places in the training split
_ORIENTATION = 0x0112


def write_coco(root: Path) -> None:
    """`annotations/instances_{train,val}2017.json`, `train2017/` and `val2017/` below `root`."""
    (root / "annotations").mkdir(parents=True)
    for split, first, count in (("train2017", 9, TRAIN), ("val2017", 139, VAL)):
        (root / split).mkdir()
        images = [_image(root / split, first + 31 * i, i, split == "train2017") for i in range(count)]
        annotations = [a for i, image in enumerate(images) for a in _annotations(image, i)]
        source = {
            "info": {
                "description": "COCO 2017 Dataset",
                "url": "http://cocodataset.org",
                "version": "1.0",
                "year": 2017,
            },
            "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution"}],
            "images": images,
            "annotations": annotations,
            "categories": [{"supercategory": "any", "id": i, "name": name} for i, name in CATEGORIES.items()],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(source), encoding="utf-8")


def _image(folder: Path, image_id: int, place: int, odd: bool) -> dict[str, Any]:
    width, height = SIZES[place % len(SIZES)]
    image, name, exif = picture(image_id, width, height), f"{image_id:012d}.jpg", Image.Exif()
    if odd and place in (UPRIGHT_BY_EXIF, TURNED_BY_EXIF):
        exif[_ORIENTATION] = 6  # the file holds the image lying on its side
        image = image.transpose(Image.Transpose.ROTATE_90)
        if place == TURNED_BY_EXIF:
            width, height = height, width  # as a tool that ignores EXIF would annotate it
    if odd and place in (GRAYSCALE, CMYK):
        image = image.convert("L" if place == GRAYSCALE else "CMYK")
    image.save(folder / name, quality=90, exif=exif)
    return {
        "license": 4, "file_name": name, "coco_url": f"http://images.cocodataset.org/{folder.name}/{name}",
        "height": height, "width": width, "date_captured": "2013-11-14 17:02:52",
        "flickr_url": f"http://farm7.staticflickr.com/{name}", "id": image_id,
    }  # fmt: skip


def _annotations(image: dict[str, Any], place: int) -> list[dict[str, Any]]:
    width, height = image["width"], image["height"]
    if place == EMPTY:
        return []
    boxes = [
        (1, [3.07, 5.31, 20.42, 24.98]),
        (3, [width - 30.0, height - 20.0, 30.0, 20.0]),  # touches the border
        ((13, 44)[place % 2], [width / 2, 1.5, width / 2 + 0.01, 18.25]),  # ends outside by rounding
    ]
    if place in (7, 8):
        boxes.append((44, [12.0, 12.0, 0.0, 7.5]))
    rows = [_annotation(image, i, category, box) for i, (category, box) in enumerate(boxes)]
    if place in (9, 10):
        rows.append(_crowd(image, place == 9))
    return rows


def _annotation(image: dict[str, Any], number: int, category: int, box: list[float]) -> dict[str, Any]:
    x, y, w, h = box
    ring = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "segmentation": [ring, [x, y, x + w / 2, y, x, y + h / 2]], "area": w * h, "iscrowd": 0,
        "image_id": image["id"], "bbox": box, "category_id": category, "id": image["id"] * 100 + number,
    }  # fmt: skip


def _crowd(image: dict[str, Any], compressed: bool) -> dict[str, Any]:
    """A run-length mask: counts as numbers, as COCO writes crowds, or as pycocotools' string."""
    size, pixels = [image["height"], image["width"]], image["height"] * image["width"]
    counts: Any = "0P2" if compressed else [0, pixels // 2, pixels - pixels // 2]
    return {
        "segmentation": {"counts": counts, "size": size}, "area": pixels // 2, "iscrowd": 1, "image_id": image["id"],
        "bbox": [0, 0, image["width"] // 2, image["height"]], "category_id": 1, "id": 900_100_000_000 + image["id"],
    }  # fmt: skip
