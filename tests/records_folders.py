"""Small folders of generated images in every format, and their conversion."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from coordexp.config.profile import DatasetConfig, RecordsConfig
from coordexp.records.convert import FILE_POLICIES, Converted, convert_datasets
from coordexp.records.images import ImageFacts
from coordexp.records.manifest import write_manifest
from coordexp.records.policy import RecordSet, to_records
from coordexp.records.sources.base import Reading

NAMES = ("person", "traffic light", "cat", "red mug")


def picture(index: int, width: int = 64, height: int = 48) -> Image.Image:
    """An image with smooth colors that depend on the index."""
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
    """`count` images with ids first, first + 1, ...; each with two objects of two names, plus `extra` annotations."""
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
    """An image with objects: name, box in whole pixels, and whether it is a crowd (in VOC: difficult)."""

    name: str  # of its file
    size: tuple[int, int]
    objects: tuple[tuple[str, tuple[int, int, int, int], bool], ...]


# The image folder of a split, and the name of its annotation file.
LAYOUTS = {
    "coco": ("{split}2017", "annotations/instances_{split}2017.json"),
    "objects365": ("{split}", "zhiyuan_objv2_{split}.json"),
    "lvis": (".", "lvis_v1_{split}.json"),
    "visual_genome": (".", "{split}/objects.json"),
    "yolo": ("images/{split}", "data.yaml"),
    "voc": ("JPEGImages", "ImageSets/Main/{split}.txt"),
    "jsonl": ("pictures", "{split}.jsonl"),
    "open_images": ("{split}", "{split}-annotations-bbox.csv"),
    "labelme": ("{split}", "{split}"),
    "cvat": ("images", "{split}.xml"),
    "csv": ("pictures", "{split}.csv"),
    "hub": (".", "data/{split}-*.parquet"),
    "conversations": ("pictures", "{split}.jsonl"),
}
QUESTIONS = {"refcoco": ("train2014", "refs(unc).json")}  # one record per expression, not per image
HOLDS_CROWDS = LAYOUTS.keys() - {"visual_genome", "yolo", "labelme", "cvat", "conversations"}
LEAVES_OUT_EMPTY = {"open_images"}  # images without an object are in no file


def write_annotations(fmt: str, root: Path, split: str, pictures: Sequence[Annotated]) -> None:
    """Write the annotations of a split in the layout of the format's publisher."""
    file = root / LAYOUTS[fmt][1].format(split=split)
    file.parent.mkdir(parents=True, exist_ok=True)
    if fmt == "jsonl":
        file.write_text("".join(f"{json.dumps(_contract_row(p))}\n" for p in pictures), encoding="utf-8")
    elif fmt == "visual_genome":
        _write_visual_genome(file, pictures)
    elif fmt in _WRITERS:
        _WRITERS[fmt](root, file, split, pictures)
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


def _write_open_images(root: Path, file: Path, split: str, pictures: Sequence[Annotated]) -> None:
    ids = {name: f"/m/0{i}" for i, name in enumerate(NAMES)}
    head = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    lines = [head]
    for p in pictures:
        (width, height), stem = p.size, Path(p.name).stem
        for desc, (x1, y1, x2, y2), crowd in p.objects:
            box = f"{x1 / width},{x2 / width},{y1 / height},{y2 / height}"
            lines.append(f"{stem},xclick,{ids[desc]},1,{box},0,0,{int(crowd)},0,0")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    described = "".join(f"{number},{name}\n" for name, number in ids.items())
    (root / "class-descriptions-boxable.csv").write_text(described, encoding="utf-8")


def _write_labelme(root: Path, file: Path, split: str, pictures: Sequence[Annotated]) -> None:
    file.mkdir(exist_ok=True)
    for p in pictures:
        shapes = [
            {"label": desc, "points": [[box[2], box[3]], [box[0], box[1]]], "group_id": None, "description": "",
             "shape_type": "rectangle", "flags": {}, "mask": None}
            for desc, box, _ in p.objects
        ]  # fmt: skip
        row = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": p.name, "imageData": "AAAA"}
        row |= {"imageHeight": p.size[1], "imageWidth": p.size[0]}
        (file / Path(p.name).with_suffix(".json")).write_text(json.dumps(row), encoding="utf-8")


def _write_cvat(root: Path, file: Path, split: str, pictures: Sequence[Annotated]) -> None:
    labels = "".join(f"<label><name>{n}</name><color>#33ddff</color><type>any</type></label>" for n in NAMES)
    images = ""
    for i, p in enumerate(pictures):
        boxes = "".join(
            f'<box label="{desc}" source="manual" occluded="0" xtl="{x1}.00" ytl="{y1}.00" xbr="{x2}.00" ybr="{y2}.00" '
            'z_order="0"><attribute name="color">red</attribute></box>'
            for desc, (x1, y1, x2, y2), _ in p.objects
        )
        images += f'<image id="{i}" name="{p.name}" width="{p.size[0]}" height="{p.size[1]}">{boxes}</image>'
    head = f"<annotations><version>1.1</version><meta><job><labels>{labels}</labels></job></meta>"
    file.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{head}{images}</annotations>', encoding="utf-8")


def _write_csv(root: Path, file: Path, split: str, pictures: Sequence[Annotated]) -> None:
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax,iscrowd"]
    for p in pictures:
        for desc, box, crowd in p.objects:
            lines.append(f"{p.name},{p.size[0]},{p.size[1]},{desc},{','.join(map(str, box))},{int(crowd)}")
        if not p.objects:
            lines.append(f"{p.name},{p.size[0]},{p.size[1]},,,,,,")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def hub_table(pictures: Sequence[Annotated], contents: Sequence[bytes]) -> pa.Table:
    """The layout that the library `datasets` writes."""
    names = {"names": list(NAMES), "_type": "ClassLabel"}
    feature = {"bbox": {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "Sequence"}}
    features = {"image": {"_type": "Image"}, "objects": {"feature": feature | {"category": names}, "_type": "Sequence"}}
    rows = [
        {
            "image_id": i, "image": {"bytes": content, "path": p.name}, "width": p.size[0], "height": p.size[1],
            "objects": {
                "bbox": [[float(v) for v in (x1, y1, x2 - x1, y2 - y1)] for _, (x1, y1, x2, y2), _ in p.objects],
                "category": [NAMES.index(desc) for desc, _, _ in p.objects],
                "iscrowd": [crowd for _, _, crowd in p.objects],
            },
        }
        for i, (p, content) in enumerate(zip(pictures, contents, strict=True))
    ]  # fmt: skip
    kinds = {
        "bbox": pa.list_(pa.list_(pa.float64())),
        "category": pa.list_(pa.int64()),
        "iscrowd": pa.list_(pa.bool_()),
    }
    schema = pa.schema([
        ("image_id", pa.int64()), ("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        ("width", pa.int64()), ("height", pa.int64()), ("objects", pa.struct(kinds)),
    ])  # fmt: skip
    return pa.Table.from_pylist(
        rows, schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    )


def _write_hub(root: Path, file: Path, split: str, pictures: Sequence[Annotated]) -> None:
    contents = []
    for i, p in enumerate(pictures):
        made = root / p.name
        contents.append(made.read_bytes() if made.is_file() else _png(picture(1000 * len(split) + i, *p.size)))
    half = (len(pictures) + 1) // 2
    for n, part in enumerate((slice(0, half), slice(half, None))):
        table = hub_table(pictures[part], contents[part])
        pq.write_table(table, file.parent / f"{split}-0000{n}-of-00002.parquet", row_group_size=2)


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def _write_conversations(root: Path, file: Path, split: str, pictures: Sequence[Annotated]) -> None:
    lines = []
    for p in pictures:
        by_x, by_y = 1000 / p.size[0], 1000 / p.size[1]
        found = [
            {"bbox_2d": [x1 * by_x, y1 * by_y, x2 * by_x, y2 * by_y], "label": desc}
            for desc, (x1, y1, x2, y2), _ in p.objects
        ]
        turns = [{"from": "human", "value": "<image>\nDetect all objects."},
                 {"from": "gpt", "value": f"```json\n{json.dumps(found)}\n```"}]  # fmt: skip
        lines.append(json.dumps({"image": p.name, "conversations": turns}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


_WRITERS = {
    "open_images": _write_open_images, "labelme": _write_labelme, "cvat": _write_cvat, "csv": _write_csv,
    "hub": _write_hub, "conversations": _write_conversations,
}  # fmt: skip


def write_photos(fmt: str, root: Path, counts: Mapping[str, int], size: tuple[int, int] = (64, 48)) -> None:
    """Images with their annotations, each with a cat on the left and a mug or a person on the right."""
    if fmt == "refcoco":
        return _write_refs(root, counts, size)
    for split, count in counts.items():
        listed = []
        for i in range(count):
            cat, other = ("cat", (2 + i % 7, 3, 30, 40), False), (NAMES[3 * (i % 2)], (32, 5, 60, 20 + i), False)
            listed.append(Annotated(f"{split}{i:03d}.jpg", size, (cat, other)))
        folder = root / LAYOUTS[fmt][0].format(split=split)
        folder /= {"visual_genome": "VG_100K", "lvis": f"{split}2017"}.get(fmt, "")
        folder.mkdir(parents=True, exist_ok=True)
        for i, p in enumerate(listed):
            picture(100 * len(split) + i, *size).save(folder / p.name)
        write_annotations(fmt, root, split, listed)
        if fmt == "hub":
            for p in listed:
                (folder / p.name).unlink()


def _write_refs(root: Path, counts: Mapping[str, int], size: tuple[int, int]) -> None:
    """Expressions for the cat in each image, and for the object on its right."""
    write_photos("coco", root, counts, size)
    images, annotations, refs = [], [], []
    (root / "train2014").mkdir(exist_ok=True)
    for split in counts:
        path = root / "annotations" / f"instances_{split}2017.json"
        source = json.loads(path.read_text(encoding="utf-8"))
        first_image, first = len(images), len(annotations)
        for row in source["images"]:
            name = f"COCO_train2014_{first_image + row['id']:012d}.jpg"
            (root / f"{split}2017" / row["file_name"]).rename(root / "train2014" / name)
            images.append(row | {"id": first_image + row["id"], "file_name": name})
        for row in source["annotations"]:
            ids = {"id": first + row["id"], "image_id": first_image + row["image_id"]}
            annotations.append(row | ids)
            sentences = [{"sent": f"the {NAMES[row['category_id'] - 1]}"}]
            refs.append({"ref_id": ids["id"], "ann_id": ids["id"], "split": split, "sentences": sentences})
        path.unlink()
        (root / f"{split}2017").rmdir()
    path.parent.rmdir()
    (root / "instances.json").write_text(json.dumps(instances(images, annotations)), encoding="utf-8")
    (root / "refs(unc).json").write_text(json.dumps(refs), encoding="utf-8")


def dataset(fmt: str, root: Path, **changes: Any) -> DatasetConfig:
    """A set that `write_annotations` wrote, with both splits."""
    images, annotations = (LAYOUTS | QUESTIONS)[fmt]
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
    """The records of a reading, as if every image existed in its annotated size, or in the given one."""
    loaded, _ = reading.loaded()
    facts = {}
    for image in loaded.images:
        width, height = size or (int(image.width), int(image.height))
        name = str(image.file_name)
        facts[name] = ImageFacts(name, 1, name, width, height, "RGB")
    return to_records(loaded, facts, records_config(**policies), split, prompt=prompt)


def converted(folder: Path, sets: Mapping[str, DatasetConfig], decode: bool = False, **config: Any) -> Converted:
    """Convert the sets through a manifest in `folder`, as the raw and convert stages do."""
    write_manifest(folder / "raw", sets, decode, workers=2)
    return convert_datasets(folder / "raw", records_config(**config), seed=17)
