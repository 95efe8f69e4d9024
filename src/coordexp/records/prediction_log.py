"""Predictions on files of the user's own: a JSONL log that resumes, and the COCO form of its lines.

A line is `Detections.to_json()`, whole and unfiltered, with `image` (the path as given), `checkpoint` (the folder) and
`key`: what decided the answer. An answer is used again only if all of its key is what it would be now.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.geometry.boxes import area, as_boxes, xyxy_to_xywh
from coordexp.infra.files import write_text

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AnswerSource:
    """What answers: a hash over all files of the checkpoint that matter, and the settings (plain JSON values)."""

    checkpoint: str
    settings: dict[str, Any]


class PredictionLog:
    """One JSON line an image, appended as answers come; the last line of an image counts.

    So the file never lacks both an answer and the one that takes its place, wherever a run is interrupted.
    """

    def __init__(self, path: Path, checkpoint: Path) -> None:
        """Reads what is there; a last line that a crash cut short is dropped.

        Raises:
            DataError: a line is no prediction, or comes from a checkpoint at another place.
        """
        self.path, self._checkpoint = path, checkpoint
        self._tidy()
        for image, row in self._rows.items():
            other = Path(str(row.get("checkpoint")))
            if other.resolve() != checkpoint.resolve():
                raise DataError(
                    f"{path}: {image} was predicted by {other}, not by {checkpoint}; one file holds one "
                    "checkpoint's predictions. Choose another --out, or delete this one."
                )
        path.parent.mkdir(parents=True, exist_ok=True)

    def __contains__(self, image: str) -> bool:
        """Whether there is an answer to this image, of now or of before."""
        return image in self._rows

    def row(self, image: str) -> Row:
        """The line of an image."""
        return self._rows[image]

    def change(self, image: str, source: AnswerSource, picture_sha256: str) -> str:
        """Why the image's answer does not hold now; empty if all that decided it is as it was."""
        changed = _changes(self._rows[image], source)
        if isinstance(key := self._rows[image].get("key"), dict) and key.get("picture_sha256") != picture_sha256:
            changed.append("picture changed")
        return " and ".join(changed)

    def add(self, image: str, source: AnswerSource, picture_sha256: str, answer: Mapping[str, Any]) -> None:
        """Append the answer to one image; it is on disk when this returns."""
        key = {**asdict(source), "picture_sha256": picture_sha256}
        row = {"image": image, "checkpoint": str(self._checkpoint), "key": key, **answer}
        with self.path.open("a", encoding="utf-8") as out:
            out.write(_line(row))
            out.flush()
        self._rows[image] = row

    def close(self, source: AnswerSource) -> int:
        """Leave one line an image; returns how many answers there are that other weights or settings gave."""
        self._tidy()
        return sum(1 for row in self._rows.values() if _changes(row, source))

    def _tidy(self) -> None:
        """Read the file, with what others may have added, and write it anew if an image has several lines."""
        self._rows: dict[str, Row] = {}
        if self.path.is_file():
            self._rows, n_lines = _read(self.path)
            if n_lines > len(self._rows):
                write_text(self.path, "".join(map(_line, self._rows.values())))


def _changes(row: Row, source: AnswerSource) -> list[str]:
    key = row.get("key")
    if not isinstance(key, dict) or not isinstance(before := key.get("settings"), dict):
        return ["an older version wrote no key"]
    changed = [] if key.get("checkpoint") == source.checkpoint else ["checkpoint changed"]
    now = json.loads(json.dumps(source.settings))  # as they come out of the file
    if names := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        changed.append(f"settings changed: {', '.join(names)}")
    return changed


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The lines of a log, one an image; raises DataError if one is no prediction."""
    return list(_read(path)[0].values())


def _read(path: Path) -> tuple[dict[str, Row], int]:
    """The newest line of each image that has an end, and the number of all lines."""
    try:
        *lines, cut = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); expected what `predict --out` writes.") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            image = row["image"]
            if not isinstance(image, str):
                raise TypeError(f"image is {image!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: no line of predictions ({error!r}); expected what `predict --out` writes."
            ) from error
        rows.pop(image, None)  # it stands where its newest line does
        rows[image] = row
    return rows, len(lines) + bool(cut)


def coco_predictions(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows in COCO's instances layout, with a `score` in every annotation.

    Image and category ids are of this file alone: images are numbered in their order, the names found alphabetically.
    """
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
