"""Predictions on the user's files: a JSONL log that can be resumed, and its conversion to COCO's layout.

A line is `Detections.to_json()`, complete and unfiltered, with `image` (the path as given), `checkpoint` (the folder)
and `key`: everything that determined the answer. An answer is reused only if its key would be the same now. For an
image that could not be read, the line has `error`, the reason, in place of an answer; the next run tries it again. Each
line contains the hash of its other keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from coordexp.errors import DamagedArtefactError, DataError
from coordexp.geometry.boxes import area, as_boxes, xyxy_to_xywh
from coordexp.infra.artefacts import SEAL, sealed_row, unsealed_row
from coordexp.infra.files import write_text
from coordexp.infra.foreign import Gate, first_fault
from coordexp.records.gt_vs_pred import OrderedBox, ParseReport, Size

PREDICTIONS = Gate("a line that `predict --out` writes", DataError, "Delete the line, or choose another file.")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Object:
    desc: str
    bbox_xyxy_px: OrderedBox
    score: float


@dataclass(frozen=True, slots=True)
class _Failure:
    """The checked keys of a line for an image that cannot be read."""

    image: str
    error: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """The checked keys of a line with an answer; a log that is only exported needs just image and objects."""

    image: str
    objects: tuple[_Object, ...]
    width: Size | None = None
    height: Size | None = None
    parse: ParseReport | None = None
    raw_text: str = ""


_ANSWER, _FAILURE = TypeAdapter(_Answer), TypeAdapter(_Failure)


@dataclass(frozen=True, slots=True)
class AnswerSource:
    """What determines an answer: a hash of the relevant checkpoint files, and the settings (plain JSON values)."""

    checkpoint: str
    settings: dict[str, Any]


class PredictionLog:
    """One JSON line per image, appended as answers arrive; the last line of an image counts.

    An answer is superseded by appending, not by rewriting. So at any interruption, the file has the old or the new
    answer.
    """

    def __init__(self, path: Path, checkpoint: Path) -> None:
        """Read the existing file; an incomplete last line from a crash is dropped.

        Raises:
            DataError: a line is not a prediction, or comes from a checkpoint in another folder.
        """
        self.path, self._checkpoint = path, checkpoint
        self._tidy()
        for image, row in self._rows.items():
            other = Path(str(row.get("checkpoint")))
            if other.resolve() != checkpoint.resolve():
                raise DataError(
                    f"{path}: {image} was predicted by {other}, not by {checkpoint}; a log is for one checkpoint. "
                    "Choose another --out, or delete this file."
                )
        path.parent.mkdir(parents=True, exist_ok=True)

    def __contains__(self, image: str) -> bool:
        """Whether the log has a line for this image."""
        return image in self._rows

    def row(self, image: str) -> Row:
        """The line for an image."""
        return self._rows[image]

    def change(self, image: str, source: AnswerSource, picture_sha256: str) -> str:
        """The reason why the image's answer is no longer valid; empty if it is."""
        if "error" in self._rows[image]:
            return "they could not be read"
        changed = _changes(self._rows[image], source)
        if isinstance(key := self._rows[image].get("key"), dict) and key.get("picture_sha256") != picture_sha256:
            changed.append("image changed")
        return " and ".join(changed)

    def add(self, image: str, source: AnswerSource, picture_sha256: str, answer: Mapping[str, Any]) -> None:
        """Append the answer for one image and flush it to the operating system."""
        key = {**asdict(source), "picture_sha256": picture_sha256}
        row = {"image": image, "checkpoint": str(self._checkpoint), "key": key, **answer}
        with self.path.open("a", encoding="utf-8") as out:
            out.write(_line(row))
            out.flush()
        self._rows[image] = row

    def close(self, source: AnswerSource) -> int:
        """Reduce the file to one line per image; returns the number of answers from other weights or settings."""
        self._tidy()
        return sum(1 for row in self._rows.values() if _changes(row, source))

    def _tidy(self) -> None:
        """Read the file, including lines of other processes, and rewrite it if an image has several lines."""
        self._rows: dict[str, Row] = {}
        if self.path.is_file():
            self._rows, n_lines, _ = _read(self.path)
            if n_lines > len(self._rows):
                write_text(self.path, "".join(map(_line, self._rows.values())))


def _changes(row: Row, source: AnswerSource) -> list[str]:
    key = row.get("key")
    if not isinstance(key, dict) or not isinstance(before := key.get("settings"), dict):
        return ["an older version wrote no key"]
    changed = [] if key.get("checkpoint") == source.checkpoint else ["checkpoint changed"]
    now = json.loads(json.dumps(source.settings))  # in the same form as in the file
    if names := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        changed.append(f"settings changed: {', '.join(names)}")
    return changed


def _line(row: Row) -> str:
    return json.dumps(sealed_row(row), ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The answers of a log, one per image; raises DataError if a line is invalid or an image has no answer."""
    by_image, n_lines, n_whole = _read(path)
    rows = list(by_image.values())
    if not rows or n_whole < n_lines:
        PREDICTIONS.refuse(f"{path}:{n_lines}", "the last line is incomplete" if n_lines else "has no answer")
    if failed := [row for row in rows if "error" in row]:
        raise DataError(
            f"{path}: {len(failed)} of {len(rows)} images have no answer; the first: {failed[0]['error']} Expected an "
            "answer per image: restore the images and predict again, or delete the lines."
        )
    return rows


def _read(path: Path) -> tuple[dict[str, Row], int, int]:
    """The newest line of each image, the number of lines, and the number of complete lines; others are ignored."""
    rows: dict[str, Row] = {}
    n_lines = n_whole = 0
    for where, line in PREDICTIONS.lines(path):
        n_lines += 1
        if not line.endswith(b"\n"):
            continue
        n_whole += 1
        row = PREDICTIONS.parse_json(line, where)
        try:
            is_failure = isinstance(row, dict) and "error" in row
            image = (_FAILURE if is_failure else _ANSWER).validate_json(line, strict=True).image
        except ValidationError as error:
            PREDICTIONS.refuse(where, first_fault(error.errors()), error)
        row = checked_row(row, where)
        rows.pop(image, None)  # keep the order of the newest lines
        rows[image] = row
    return rows, n_lines, n_whole


def checked_row(row: Row, where: str) -> Row:
    """The row without its hash. A row without a hash is foreign or from an older version: its key is ignored."""
    if SEAL not in row:
        return {name: value for name, value in row.items() if name != "key"}
    try:
        return unsealed_row(row)
    except ValueError as error:
        raise DamagedArtefactError(
            f"{where}: {error}: damaged, or edited. Delete the line to predict the image again, or only its {SEAL} if "
            "you made the change."
        ) from error


def coco_predictions(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows in COCO's instances layout, with a `score` in every annotation.

    Image and category ids are valid only in this file: images are numbered in order, names alphabetically.
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
