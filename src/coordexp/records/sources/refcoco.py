"""RefCOCO, RefCOCO+ and RefCOCOg: one record per referring expression, with one box as the answer.

Four forms are supported; the original `refs(*.p)` is a pickle and is refused:
* the refs as JSON, a list of {ref_id, ann_id, split, sentences}, next to an `instances.json`;
* MDETR's `finetune_refcoco*_{train,val,...}.json`: COCO's layout with a `caption` on each image;
* parquet with `image_path`, `captions` and `bbox` as corners (such as jxu124/refcoco on the Hub);
* parquet with `file_name`, `answer` and `bbox` as x, y, w, h (such as lmms-lab/RefCOCO on the Hub).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.records.sources.base import (
    Problem,
    Reading,
    SourceImage,
    SourceObject,
    SplitFiles,
    corners,
    corners_of_xywh,
)
from coordexp.records.sources.coco import annotated_box, as_id, load_instances
from coordexp.records.sources.files import opened_parquet, read_json, refuse_pickle, shown

INSTANCES = "instances.json"
FORMS = "a list of refs, MDETR's finetune_refcoco*.json, or the Hub's parquet form"
# A ref's file name includes the annotation's number: COCO_train2014_000000581857_16.jpg is an object of ..581857.jpg.
_OF_ANNOTATION = re.compile(r"(COCO_[a-z]+\d{4}_\d{12})_\d+(\.jpg)$")


def read(files: SplitFiles) -> Reading:
    """Read RefCOCO and its variants; the image folder contains `COCO_train2014_*.jpg`."""
    refuse_pickle(files.path)
    if files.path.suffix == ".parquet":
        return _read_parquet(files)
    source = read_json(files.path, FORMS)
    if isinstance(source, list):
        return _read_refs(files, source)
    return _read_mdetr(files)


def read_from(files: SplitFiles) -> list[Path]:
    """The refs file, and the annotation file that it may refer to."""
    return [files.path, files.path.parent / INSTANCES]


def plain_name(name: object) -> object:
    """The COCO image for a ref's file name, without folders."""
    if not isinstance(name, str):
        return name
    return _OF_ANNOTATION.sub(r"\1\2", name.split("/")[-1])


def _question(
    files: SplitFiles, name: object, phrase: Any, box: Box | None, key: str, size: tuple[Any, Any] = (None, None),
    has_size: bool = True,
) -> SourceImage:  # fmt: skip
    """One referring expression for one image."""
    return SourceImage(
        file_name=files.image_name(plain_name(name)),
        key=key,
        image_id=None,
        width=size[0],
        height=size[1],
        objects=(SourceObject(phrase, box, "object", has_size=has_size),),
        file=str(files.path),
        metadata={"phrase": " ".join(phrase.split()) if isinstance(phrase, str) else ""},
    )


def _read_refs(files: SplitFiles, refs: list[Any]) -> Reading:
    instances = load_instances(files.path.parent / INSTANCES)
    by_annotation = {as_id(row.get("id")): (image, row) for image, rows in instances.by_image() for _, row in rows}
    problems: list[Problem] = []

    def images() -> Iterator[SourceImage]:
        for i, ref in enumerate(refs):
            fields = ref if isinstance(ref, dict) else {}
            if fields.get("split") != files.split:
                continue
            annotation_id = as_id(fields.get("ann_id"))
            found = None if annotation_id is None else by_annotation.get(annotation_id)
            if found is None:
                detail = f"ann_id {fields.get('ann_id')!r:.40}"
                problems.append(
                    Problem("unknown_annotation", str(files.path), f"ref {fields.get('ref_id', i)}", detail)
                )
                continue
            image, box = found[0], annotated_box(found[1])
            for j, phrase in enumerate(_sentences(fields.get("sentences"))):
                key = f"ref {fields.get('ref_id', i)}, sentence {j}"
                yield _question(files, image.file_name, phrase, box, key, (image.width, image.height))

    if not any(isinstance(ref, dict) and ref.get("split") == files.split for ref in refs):
        raise DataError(f"{files.path}: no ref of split {files.split!r}; expected {FORMS}.")
    return Reading(images(), (), problems)


def _sentences(value: Any) -> Iterator[Any]:
    for sentence in value if isinstance(value, list) else []:
        yield sentence.get("sent", sentence.get("raw")) if isinstance(sentence, dict) else sentence


def _read_mdetr(files: SplitFiles) -> Reading:
    instances = load_instances(files.path)
    if not all("caption" in (image.more or {}) for image in instances.images):
        raise DataError(f"{files.path}: images have no caption; expected {FORMS}.")

    def images() -> Iterator[SourceImage]:
        for image, rows in instances.by_image():
            for key, row in rows:
                where = f"image {image.image_id}, {key}"
                size = (image.width, image.height)
                yield _question(files, image.file_name, image.get("caption"), annotated_box(row), where, size)

    return Reading(images(), (), instances.problems)


def _read_parquet(files: SplitFiles) -> Reading:
    with opened_parquet(files.path, FORMS) as table:
        names = set(table.schema_arrow.names)
    box_of: Callable[[Any], Box | None]
    if names >= {"image_path", "captions", "bbox"}:
        columns, box_of = ("image_path", "captions", "bbox"), corners
    elif names >= {"file_name", "answer", "bbox"}:
        columns, box_of = ("file_name", "answer", "bbox"), corners_of_xywh
    else:
        raise DataError(f"{files.path}: has the columns {shown(sorted(names), 200)}; expected {FORMS}.")

    def images() -> Iterator[SourceImage]:
        number = 0
        with opened_parquet(files.path, FORMS) as table:
            for batch in table.iter_batches(columns=list(columns)):  # never the embedded images
                for row in batch.to_pylist():
                    for j, phrase in enumerate(_listed(row[columns[1]])):
                        name, box, key = row[columns[0]], box_of(row["bbox"]), f"row {number}, sentence {j}"
                        yield _question(files, name, phrase, box, key, has_size=box_of is corners_of_xywh)
                    number += 1

    return Reading(images(), (), [])


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]
