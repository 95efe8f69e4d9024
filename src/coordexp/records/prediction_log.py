"""Predictions on files of the user's own: a JSONL log that resumes, and the COCO form of its lines.

A line is `Detections.to_json()` with `image` (the path as given) and `checkpoint` (what answered).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coordexp.config.files import write_text
from coordexp.errors import DataError
from coordexp.geometry.boxes import area, as_boxes, xyxy_to_xywh

Row = dict[str, Any]


class PredictionLog:
    """One JSON line an image, appended as answers come; a line that a crash cut short is written again."""

    def __init__(self, path: Path, checkpoint: str) -> None:
        """Reads what is there.

        Raises:
            DataError: a line is no prediction, or comes from another checkpoint.
        """
        self._path, self._checkpoint = path, checkpoint
        self.rows: dict[str, Row] = {}
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n")]
            for number, line in enumerate(kept, 1):
                self._take(line, f"{path}:{number}")
            if len(kept) < len(lines):
                write_text(path, "".join(kept))
        path.parent.mkdir(parents=True, exist_ok=True)

    def _take(self, line: str, where: str) -> None:
        try:
            row = json.loads(line)
            image, checkpoint = row["image"], row["checkpoint"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{where}: no line of predictions ({error!r}); expected what `predict --out` writes."
            ) from error
        if checkpoint != self._checkpoint:
            raise DataError(
                f"{where}: predicted by {checkpoint}, not by {self._checkpoint}; one file holds one checkpoint's "
                "predictions. Choose another --out, or delete this one."
            )
        self.rows[image] = row

    def add(self, image: str, answer: Mapping[str, Any]) -> None:
        """Append the answer to one image; it is on disk when this returns."""
        row = {"image": image, "checkpoint": self._checkpoint, **answer}
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[image] = row


def coco_predictions(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows in COCO's instances layout, with a `score` in every annotation; names are numbered alphabetically."""
    listed: Sequence[Mapping[str, Any]] = list(rows)
    names = sorted({o["desc"] for row in listed for o in row["objects"]})
    category_of = {name: number for number, name in enumerate(names, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, row in enumerate(listed, 1):
        images.append({"id": image_id, "file_name": row["image"], "width": row["width"], "height": row["height"]})
        boxes = as_boxes([o["bbox_xyxy_px"] for o in row["objects"]])
        for obj, xywh, px2 in zip(row["objects"], xyxy_to_xywh(boxes).tolist(), area(boxes).tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_of[obj["desc"]],
                    "bbox": xywh,
                    "area": px2,
                    "iscrowd": 0,
                    "score": obj["score"],
                }
            )
    categories = [{"id": number, "name": name} for name, number in category_of.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
