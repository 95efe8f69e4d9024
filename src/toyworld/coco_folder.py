"""Write composed scenes as a COCO folder: `annotations/instances_<split>.json` and `<split>/*.jpg`."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from coordexp.config.profile import DatasetConfig, DatasetsConfig, ScenesConfig
from coordexp.infra.files import write_text
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
    out: Path


def write_coco_folder(out: Path, source: ScenesConfig, seed: int, workers: int) -> None:
    """Compose train and val in parallel processes.

    The result does not depend on `workers`: each scene has its own random generator.
    """
    catalog = load_catalog(Path(source.sprites))
    for split, count in (("train", source.train_images), ("val", source.val_images)):
        (out / split).mkdir(parents=True, exist_ok=True)
        chunks = [
            _Chunk(source, seed + source.seed_offset, split, first, min(first + CHUNK_SCENES, count), out)
            for first in range(0, count, CHUNK_SCENES)
        ]
        with ProcessPoolExecutor(max_workers=workers) as pool:
            rows = [row for chunk in pool.map(_write_chunk, chunks) for row in chunk]
        write_text(out / ANNOTATIONS.format(split=split), json.dumps(_instances(rows, catalog)))


def as_datasets(folder: Path) -> DatasetsConfig:
    """A composed folder as what it is to a profile: a set of the user, in COCO's layout."""
    keys = {
        "format": "coco", "root": str(folder.absolute()), "train": ANNOTATIONS.format(split="train"),
        "val": ANNOTATIONS.format(split="val"), "train_images": "train", "val_images": "val", "weight": 1.0,
        "prompt": "open",
    }  # fmt: skip
    return DatasetsConfig(kind="datasets", verify="header", sets={folder.name: DatasetConfig.model_validate(keys)})


@lru_cache(maxsize=1)
def _catalog_of_worker(sprites: Path) -> SpriteCatalog:
    """Read once in each process: it hashes every sprite, which costs as much as dozens of scenes."""
    return load_catalog(sprites)


def _write_chunk(chunk: _Chunk) -> list[dict[str, Any]]:
    catalog = _catalog_of_worker(Path(chunk.source.sprites))
    rows = []
    for index in range(chunk.first, chunk.last):
        scene = compose_scene(chunk.source, catalog, chunk.seed, chunk.split, index)
        path = chunk.out / chunk.split / f"{index:06d}.jpg"
        Image.fromarray(scene.pixels).save(path, quality=JPEG_QUALITY)
        size = scene.pixels.shape[:2]
        rows.append({"id": index + 1, "file_name": path.name, "size": size, "objects": scene.objects})
    return rows


def _instances(rows: list[dict[str, Any]], catalog: SpriteCatalog) -> dict[str, Any]:
    """COCO's instances layout; category ids are 1-based, held-out names carry `supercategory: held_out`."""
    category_ids = {desc: i for i, desc in enumerate(catalog.descs, 1)}
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
        {"id": i, "name": desc, "supercategory": "held_out" if desc in catalog.held_out else "train"}
        for desc, i in category_ids.items()
    ]
    return {"images": images, "annotations": annotations, "categories": categories}
