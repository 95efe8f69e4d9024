"""Small folders of generated pictures in every format, and their conversion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coordexp.config.profile import DatasetConfig, RecordsConfig
from coordexp.records.convert import FILE_POLICIES, Converted, convert_datasets
from coordexp.records.images import ImageFacts
from coordexp.records.manifest import write_manifest
from coordexp.records.policy import RecordSet, to_records
from coordexp.records.sources.base import Reading

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


@dataclass(frozen=True, slots=True)
class Annotated:
    """A picture with objects: name, box in whole pixels, and whether it is a crowd (in VOC: difficult)."""

    name: str  # of its file
    size: tuple[int, int]
    objects: tuple[tuple[str, tuple[int, int, int, int], bool], ...]


# Where the pictures of a split lie, and what the annotation file is called.
LAYOUTS = {
    "coco": ("{split}2017", "annotations/instances_{split}2017.json"),
    "objects365": ("{split}", "zhiyuan_objv2_{split}.json"),
    "lvis": (".", "lvis_v1_{split}.json"),
    "visual_genome": ("VG_100K", "{split}/objects.json"),
    "yolo": ("images/{split}", "data.yaml"),
    "voc": ("JPEGImages", "ImageSets/Main/{split}.txt"),
    "jsonl": ("pictures", "{split}.jsonl"),
}
HOLDS_CROWDS = LAYOUTS.keys() - {"visual_genome", "yolo"}


def write_annotations(fmt: str, root: Path, split: str, pictures: Sequence[Annotated]) -> None:
    """The annotations of a split as a publisher of the format lays them out."""
    file = root / LAYOUTS[fmt][1].format(split=split)
    file.parent.mkdir(parents=True, exist_ok=True)
    if fmt == "jsonl":
        file.write_text("".join(f"{json.dumps(_contract_row(p))}\n" for p in pictures), encoding="utf-8")
    elif fmt == "visual_genome":
        _write_visual_genome(file, pictures)
    elif fmt == "yolo":
        file.write_text(f"names: {json.dumps(NAMES)}\n", encoding="utf-8")
        for p in pictures:
            label = root / "labels" / split / Path(p.name).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("".join(_yolo_line(p, desc, box) for desc, box, _ in p.objects), encoding="utf-8")
    elif fmt == "voc":
        file.write_text("".join(f"{Path(p.name).stem}\n" for p in pictures), encoding="utf-8")
        (root / "Annotations").mkdir(exist_ok=True)
        for p in pictures:
            (root / "Annotations" / Path(p.name).with_suffix(".xml")).write_text(_voc_xml(p), encoding="utf-8")
    else:
        file.write_text(json.dumps(_instances_of(pictures, f"{split}2017")), encoding="utf-8")


def _contract_row(p: Annotated) -> dict[str, Any]:
    objects = [{"desc": d, "bbox_2d": list(box), "metadata": {"iscrowd": int(c)}} for d, box, c in p.objects]
    return {"images": [p.name], "width": p.size[0], "height": p.size[1], "objects": objects}


def _instances_of(pictures: Sequence[Annotated], folder: str) -> dict[str, Any]:
    images, annotations = [], []
    for i, p in enumerate(pictures, 1):
        image = {"id": i, "file_name": p.name, "width": p.size[0], "height": p.size[1]}
        images.append(image | {"coco_url": f"http://images.cocodataset.org/{folder}/{p.name}"})
        for desc, (x1, y1, x2, y2), crowd in p.objects:
            row = annotation(len(annotations) + 1, i, NAMES.index(desc) + 1, [x1, y1, x2 - x1, y2 - y1])
            annotations.append(row | {"iscrowd": int(crowd)})
    return instances(images, annotations)


def _write_visual_genome(file: Path, pictures: Sequence[Annotated]) -> None:
    data, entries = [], []
    for i, p in enumerate(pictures, 1):
        width, height = p.size
        data.append({"image_id": i, "url": f"https://x/VG_100K/{p.name}", "width": width, "height": height})
        objects = [
            {"object_id": j, "names": [desc], "x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1}
            for j, (desc, (x1, y1, x2, y2), _) in enumerate(p.objects)
        ]
        entries.append({"image_id": i, "objects": objects})
    file.write_text(json.dumps(entries), encoding="utf-8")
    (file.parent / "image_data.json").write_text(json.dumps(data), encoding="utf-8")


def _yolo_line(p: Annotated, desc: str, box: tuple[int, int, int, int]) -> str:
    (width, height), (x1, y1, x2, y2) = p.size, box
    center = f"{(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height}"
    return f"{NAMES.index(desc)} {center} {(x2 - x1) / width} {(y2 - y1) / height}\n"


def _voc_xml(p: Annotated) -> str:
    objects = "".join(
        f"<object><name>{desc}</name><difficult>{int(crowd)}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
        f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for desc, (x1, y1, x2, y2), crowd in p.objects
    )
    size = f"<size><width>{p.size[0]}</width><height>{p.size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{p.name}</filename>{size}{objects}</annotation>"


def dataset(fmt: str, root: Path, **changes: Any) -> DatasetConfig:
    """A set that `write_annotations` wrote, with both splits."""
    images, annotations = LAYOUTS[fmt]
    keys: dict[str, Any] = {"format": fmt, "root": str(root), "weight": 1.0, "prompt": "open"}
    for split in ("train", "val"):
        keys |= {split: annotations.format(split=split), f"{split}_images": images.format(split=split)}
    return DatasetConfig(**(keys | changes))


def coco_set(root: Path, **changes: Any) -> DatasetConfig:
    """A set that `write_split` wrote."""
    return dataset("coco", root, **changes)


def records_config(**changes: Any) -> RecordsConfig:
    small = {"dev_images": 2, "max_lost": 1.0, "wordings": 4, "listed_names": 3}
    return RecordsConfig.model_validate(FILE_POLICIES.model_dump() | small | changes)


def kept(
    reading: Reading, size: tuple[int, int] | None = None, split: str = "train", prompt: str = "open", **policies: Any
) -> RecordSet:
    """The records of a reading, as if every image were there in its annotated size, or in the given one."""
    loaded, _ = reading.loaded()
    facts = {}
    for image in loaded.images:
        width, height = size or (int(image.width), int(image.height))
        name = str(image.file_name)
        facts[name] = ImageFacts(name, 1, name, width, height, "RGB")
    return to_records(loaded, facts, records_config(**policies), split, prompt=prompt)


def converted(folder: Path, sets: Mapping[str, DatasetConfig], decode: bool = False, **config: Any) -> Converted:
    """The sets by way of a manifest in `folder`, as the raw and convert stages do it."""
    write_manifest(folder / "raw", sets, decode, workers=2)
    return convert_datasets(folder / "raw", records_config(**config), seed=17)
