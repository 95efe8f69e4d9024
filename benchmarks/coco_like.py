"""Synthetic data with COCO's statistics, for benchmarks that need its size but not its images.

From the published figures of COCO 2017 (Lin et al. 2014, arXiv:1405.0312, and the instances files): 118,287 training
images, 1,021 of them without objects, 860,001 boxes (7.3 per image, with a long tail to 93), 80 names of which `person`
has 30 %, about 41 % of the objects below 32^2 px and 24 % above 96^2, 1.2 % crowds; most images have 640 px on the long
side.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRAIN_IMAGES = 118_287
VAL_IMAGES = 5_000
EMPTY_SHARE = 1_021 / TRAIN_IMAGES
BOXES_PER_IMAGE = 860_001 / TRAIN_IMAGES
CROWD_SHARE = 0.012
PERSON_SHARE = 0.305
MOST_OBJECTS = 93
N_NAMES = 80
SIZES_WH = ((640, 480), (640, 427), (480, 640), (427, 640), (500, 375), (640, 640), (612, 612), (500, 333))
SIZE_SHARES = (0.31, 0.29, 0.13, 0.10, 0.06, 0.04, 0.03, 0.04)
# sqrt(w h) in px: log-normal, with COCO's shares of small and large objects.
LOG_SIDE_MEAN, LOG_SIDE_SD = np.log(41.0), 1.15
LEAST_SIDE_PX = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class Scenes:
    """Images and their objects as flat arrays: I images, G objects grouped by image. Boxes are xyxy in pixels."""

    sizes_wh_I2: NDArray[np.int64]
    counts_I: NDArray[np.int64]
    boxes_G4: NDArray[np.float64]
    names_G: NDArray[np.int64]  # 0..79; 0 is the most common one
    crowd_G: NDArray[np.bool_]


def names() -> list[str]:
    """COCO's 80 names."""
    return _NAMES.split(",")


def object_counts(rng: np.random.Generator, n_images: int) -> NDArray[np.int64]:
    """Objects by image: a geometric tail as in COCO, with its mean and its share of empty images."""
    mean_of_others = BOXES_PER_IMAGE / (1 - EMPTY_SHARE)
    counts = rng.geometric(1 / mean_of_others, n_images)
    return np.where(rng.random(n_images) < EMPTY_SHARE, 0, np.minimum(counts, MOST_OBJECTS))


def scenes(n_images: int, seed: int = 17, objects: int | None = None) -> Scenes:
    """Annotated images, with COCO's numbers of objects or so many each."""
    rng = np.random.default_rng(seed)
    sizes = np.array(SIZES_WH)[rng.choice(len(SIZES_WH), n_images, p=SIZE_SHARES)]
    counts = object_counts(rng, n_images) if objects is None else np.full(n_images, objects)
    n = int(counts.sum())
    frame = np.repeat(sizes, counts, axis=0).astype(float)
    side = np.exp(rng.normal(LOG_SIDE_MEAN, LOG_SIDE_SD, n))
    aspect = np.exp(rng.normal(0, 0.45, n))
    wh = np.stack([side * aspect, side / aspect], axis=1)
    wh = np.clip(wh, LEAST_SIDE_PX, frame)
    corner = rng.random((n, 2)) * (frame - wh)
    boxes = np.concatenate([corner, corner + wh], axis=1).round(2)
    # A picture shows few kinds of things: each image draws its objects from up to four names.
    shares = np.r_[PERSON_SHARE, (1 - PERSON_SHARE) * _zipf(N_NAMES - 1)]
    palette = rng.choice(N_NAMES, (n_images, 4), p=shares)
    image_of = np.repeat(np.arange(n_images), counts)
    return Scenes(sizes, counts, boxes, palette[image_of, rng.integers(0, 4, n)], rng.random(n) < CROWD_SHARE)


def _zipf(n: int) -> NDArray[np.float64]:
    weights = 1 / (np.arange(n) + 10.0)
    return weights / weights.sum()


def write_instances(path: Path, n_images: int, seed: int = 17) -> int:
    """Write an instances file with polygons of COCO's length (they are most of its bytes); returns its boxes."""
    made = scenes(n_images, seed)
    rng = np.random.default_rng([seed, 1])
    # Drawn from a thousand, because making each would take longer than all that is measured.
    polygons = [json.dumps([rng.uniform(0, 480, 2 * n).round(2).tolist()]) for n in rng.integers(8, 41, 1000)]
    image_of = np.repeat(np.arange(1, n_images + 1), made.counts_I).tolist()
    x, y, w, h = np.concatenate([made.boxes_G4[:, :2], made.boxes_G4[:, 2:] - made.boxes_G4[:, :2]], axis=1).T.round(2)
    columns = (c.tolist() for c in (x, y, w, h, (w * h * 0.6).round(4), made.names_G + 1, made.crowd_G))
    shapes = rng.integers(0, len(polygons), len(image_of)).tolist()
    categories = [{"id": i, "name": name, "supercategory": "thing"} for i, name in enumerate(names(), 1)]
    with path.open("w", encoding="utf-8") as out:
        out.write('{"info": {}, "licenses": [], "images": ')
        json.dump([_image(i, w, h) for i, (w, h) in enumerate(made.sizes_wh_I2.tolist(), 1)], out)
        out.write(f', "categories": {json.dumps(categories)}, "annotations": [')
        for number, (image, shape, x1, y1, width, height, area, category, crowd) in enumerate(
            zip(image_of, shapes, *columns, strict=True), 1
        ):
            mask = f'{{"counts": [{int(width * height)}], "size": [480, 640]}}' if crowd else polygons[shape]
            out.write(
                f'{", " if number > 1 else ""}{{"segmentation": {mask}, "area": {area}, "iscrowd": {int(crowd)}, '
                f'"image_id": {image}, "bbox": [{x1}, {y1}, {width}, {height}], "category_id": {category}, '
                f'"id": {number}}}'
            )
        out.write("]}")
    return len(image_of)


def _image(number: int, width: int, height: int) -> dict[str, Any]:
    return {
        "license": 3,
        "file_name": f"{number:012d}.jpg",
        "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 11:18:45",
        "id": number,
    }


def write_results(path: Path, n_images: int, n_predictions: int, seed: int = 17, objects: int | None = None) -> None:
    """Write a gt_vs_pred.jsonl: `n_predictions` scored boxes an image, about a third of which lie on an object."""
    made, labels = scenes(n_images, seed, objects), [f'"{name}"' for name in names()]
    rng = np.random.default_rng([seed, 2])
    ends = np.cumsum(made.counts_I)
    with path.open("w", encoding="utf-8") as out:
        for image, (end, count) in enumerate(zip(ends.tolist(), made.counts_I.tolist(), strict=True)):
            objects = slice(end - count, end)
            truth = made.boxes_G4[objects], made.names_G[objects]
            width, height = made.sizes_wh_I2[image].tolist()
            gt = [
                f'{{"desc": {labels[name]}, "bbox_xyxy_px": {box}, "iscrowd": {str(bool(crowd)).lower()}}}'
                for name, box, crowd in zip(truth[1], truth[0].tolist(), made.crowd_G[objects], strict=True)
            ]
            boxes, found, logprobs = predictions(rng, *truth, (width, height), n_predictions)
            pred = [
                f'{{"desc": {labels[name]}, "bbox_xyxy_px": {box}, "bins": [0, 0, 0, 0], "coord_logprobs": '
                f'[{lp}, {lp}, {lp}, {lp}], "desc_logprob": {lp / 2:.8f}, "score": {score}}}'
                for name, box, lp, score in zip(
                    found, boxes.tolist(), logprobs.tolist(), np.exp(logprobs).round(9).tolist(), strict=True
                )
            ]
            parse = f'{{"container_found": true, "n_valid": {n_predictions}}}'
            out.write(
                f'{{"image_id": {image + 1}, "image": "{image + 1:012d}.jpg", "width": {width}, "height": {height}, '
                f'"gt": [{", ".join(gt)}], "pred": [{", ".join(pred)}], "raw_text": "", "parse": {parse}, '
                f'"finish_reason": "stop", "n_generated_tokens": {20 * n_predictions}}}\n'
            )


def predictions(
    rng: np.random.Generator, boxes_M4: NDArray, names_M: NDArray, size_wh: tuple[int, int], n: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Boxes (n, 4), names and log-probabilities of one image: some around its objects, the rest anywhere."""
    side = np.exp(rng.uniform(np.log(12), np.log(240), (n, 2)))
    corner = rng.random((n, 2)) * (np.array(size_wh) - side)
    boxes, labels = np.concatenate([corner, corner + side], axis=1), rng.integers(0, N_NAMES, n)
    near = rng.random(n) < (0.35 if len(boxes_M4) else 0.0)
    if near.any():
        target = rng.integers(0, len(boxes_M4), near.sum())
        sides = np.tile(boxes_M4[:, 2:] - boxes_M4[:, :2], 2)[target]
        moved = boxes_M4[target] + rng.normal(0, 0.06, sides.shape) * sides + rng.normal(0, 1, (near.sum(), 1))
        boxes[near] = np.concatenate(
            [np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], axis=1
        )
        labels[near] = np.where(rng.random(near.sum()) < 0.85, names_M[target], labels[near])
    # All different: the order of equal scores is nobody's to say, and results could not be compared digit by digit.
    logprobs = -abs(np.where(near, rng.normal(-0.8, 0.5, n), rng.normal(-1.4, 0.5, n)))
    return boxes.round(3), labels, logprobs.round(8)


_NAMES = (
    "person,car,chair,book,bottle,cup,dining table,bowl,traffic light,handbag,umbrella,bird,boat,truck,bench,sheep,"
    "banana,kite,motorcycle,backpack,potted plant,cow,wine glass,carrot,knife,broccoli,donut,bicycle,skis,vase,horse,"
    "tie,cell phone,orange,cake,sports ball,clock,suitcase,spoon,surfboard,bus,apple,pizza,tv,couch,remote,sink,"
    "skateboard,elephant,dog,fork,zebra,airplane,giraffe,laptop,tennis racket,teddy bear,cat,train,sandwich,bed,toilet,"
    "baseball glove,oven,baseball bat,hot dog,keyboard,snowboard,frisbee,refrigerator,mouse,stop sign,toothbrush,"
    "fire hydrant,microwave,scissors,bear,parking meter,toaster,hair drier"
)
