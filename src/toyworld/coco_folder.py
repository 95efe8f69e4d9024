"""Write composed scenes as a COCO folder: `annotations/instances_<split>.json`, and `<split>/*.jpg` in shards."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from coordexp.config.profile import DatasetConfig, DatasetsConfig, ScenesConfig
from coordexp.infra.files import write_text
from coordexp.infra.workers import begin_worker
from coordexp.records.shards import write_shards
from toyworld.composer import compose_scene
from toyworld.sprites import SpriteCatalog, load_catalog

ANNOTATIONS = "annotations/instances_{split}.json"
JPEG_QUALITY = 92
CHUNK_SCENES = 250


@dataclass(frozen=True, slots=True)
class _Chunk:
    source: ScenesConfig
    seed: int
    split: str
    first: int
    last: int
    unwritten: float


def write_coco_folder(out: Path, source: ScenesConfig, seed: int, workers: int, unwritten: float = 0.0) -> None:
    """Compose train and val in parallel processes; `unwritten` as in `compose_scene`.

    The result does not depend on `workers`: each scene has its own random generator.
    """
    counts = {"train": source.train_images, "val": source.val_images}
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in counts}
    with ProcessPoolExecutor(max_workers=workers, initializer=begin_worker) as pool:
        composed = {
            split: pool.map(_compose_chunk, _chunks(source, seed + source.seed_offset, split, count, unwritten))
            for split, count in counts.items()
        }
        write_shards(out, {split: _pictures(split, chunks, rows[split]) for split, chunks in composed.items()})
    catalog = load_catalog(Path(source.sprites))
    for split in counts:
        write_text(out / ANNOTATIONS.format(split=split), json.dumps(_instances(rows[split], catalog)))


def _chunks(source: ScenesConfig, seed: int, split: str, count: int, unwritten: float) -> list[_Chunk]:
    firsts = range(0, count, CHUNK_SCENES)
    return [_Chunk(source, seed, split, first, min(first + CHUNK_SCENES, count), unwritten) for first in firsts]


def _pictures(
    split: str, chunks: Iterable[list[tuple[dict[str, Any], bytes]]], rows: list[dict[str, Any]]
) -> Iterator[tuple[str, bytes]]:
    """Yield file names and JPEG bytes from the workers; append the rows for the annotations to `rows`."""
    for row, jpeg in (scene for chunk in chunks for scene in chunk):
        rows.append(row)
        yield f"{split}/{row['file_name']}", jpeg


def as_datasets(folder: Path) -> DatasetsConfig:
    """A composed folder as a profile's data set in COCO layout."""
    keys = {
        "format": "coco", "root": str(folder.absolute()), "train": ANNOTATIONS.format(split="train"),
        "val": ANNOTATIONS.format(split="val"), "train_images": "train", "val_images": "val", "weight": 1.0,
        "prompt": "mixed",
    }  # fmt: skip
    return DatasetsConfig(kind="datasets", verify="header", sets={folder.name: DatasetConfig.model_validate(keys)})


@lru_cache(maxsize=1)
def _catalog_of_worker(sprites: Path) -> SpriteCatalog:
    """The catalog, read once per process: hashing every sprite costs as much as dozens of scenes."""
    return load_catalog(sprites)


def _compose_chunk(chunk: _Chunk) -> list[tuple[dict[str, Any], bytes]]:
    catalog = _catalog_of_worker(Path(chunk.source.sprites))
    scenes = []
    for index in range(chunk.first, chunk.last):
        scene = compose_scene(chunk.source, catalog, chunk.seed, chunk.split, index, chunk.unwritten)
        jpeg = io.BytesIO()
        Image.fromarray(scene.pixels).save(jpeg, "JPEG", quality=JPEG_QUALITY)
        name, size = f"{index:06d}.jpg", scene.pixels.shape[:2]
        row = {"id": index + 1, "file_name": name, "size": size, "objects": scene.objects}
        scenes.append((row, jpeg.getvalue()))
    return scenes


def _instances(rows: list[dict[str, Any]], catalog: SpriteCatalog) -> dict[str, Any]:
    """The annotations in COCO's instances layout; category ids start at 1, and the supercategory is the tier."""
    category_ids = {label.name: i for i, label in enumerate(catalog.labels, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in rows:
        height, width = row["size"]
        images.append({"id": row["id"], "file_name": row["file_name"], "width": width, "height": height})
        for obj in row["objects"]:
            x1, y1, x2, y2 = obj.bbox_xyxy_px
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": row["id"],
                    "category_id": category_ids[obj.desc],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": category_ids[label.name], "name": label.name, "supercategory": label.tier} for label in catalog.labels
    ]
    return {"images": images, "annotations": annotations, "categories": categories}
