"""Write composed scenes as a COCO folder: `annotations/instances_<split>.json` and `images/<split>/*.jpg`."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from coordexp.records.scenes.composer import SceneSpec, compose_scene
from coordexp.records.scenes.sprites import SpriteCatalog, load_catalog

JPEG_QUALITY = 92
CHUNK_SCENES = 250


@dataclass(frozen=True, slots=True)
class _Chunk:
    spec: SceneSpec
    sprites: Path
    seed: int
    split: str
    first: int
    last: int
    out: Path


def write_coco_folder(
    out: Path, spec: SceneSpec, sprites: Path, seed: int, images_per_split: dict[str, int], workers: int
) -> dict[str, Any]:
    """Compose every split in parallel processes; returns its numbers of images and objects and a hash over its images.

    The result does not depend on `workers`: each scene has its own random generator.
    """
    catalog = load_catalog(sprites)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"images": images_per_split, "objects": {}, "image_hashes": {}}
    for split, count in images_per_split.items():
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        chunks = [
            _Chunk(spec, sprites, seed, split, first, min(first + CHUNK_SCENES, count), out)
            for first in range(0, count, CHUNK_SCENES)
        ]
        with ProcessPoolExecutor(max_workers=workers) as pool:
            rows = [row for chunk in pool.map(_write_chunk, chunks) for row in chunk]
        instances = _instances(rows, catalog)
        (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(instances), encoding="utf-8")
        made["objects"][split] = len(instances["annotations"])
        made["image_hashes"][split] = hashlib.sha256(b"".join(row["sha256"] for row in rows)).hexdigest()[:16]
    return made


@lru_cache(maxsize=1)
def _catalog_of_worker(sprites: Path) -> SpriteCatalog:
    """Read once in each process: it hashes every sprite, which costs as much as dozens of scenes."""
    return load_catalog(sprites)


def _write_chunk(chunk: _Chunk) -> list[dict[str, Any]]:
    catalog = _catalog_of_worker(chunk.sprites)
    rows = []
    for index in range(chunk.first, chunk.last):
        scene = compose_scene(chunk.spec, catalog, chunk.seed, chunk.split, index)
        path = chunk.out / "images" / chunk.split / f"{index:06d}.jpg"
        Image.fromarray(scene.pixels).save(path, quality=JPEG_QUALITY)
        row = {"id": index + 1, "file_name": path.name, "sha256": hashlib.sha256(path.read_bytes()).digest()}
        rows.append(row | {"pixels": scene.pixels.shape, "objects": scene.objects})
    return rows


def _instances(rows: list[dict[str, Any]], catalog: SpriteCatalog) -> dict[str, Any]:
    """COCO's instances layout; category ids are 1-based, held-out names carry `supercategory: held_out`."""
    category_ids = {desc: i for i, desc in enumerate(catalog.descs, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in rows:
        height, width = row["pixels"][:2]
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
