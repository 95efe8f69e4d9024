"""Predictions of any detector, joined with the annotations of a `Truth`.

| form | contents of the file |
|---|---|
| `coco` | COCO results, `[{"image_id", "category_id", "bbox": [x, y, w, h], "score"}]`, or instances with scores |
| `lines` | `coordexp predict --out` or `--json`: `{"image", "objects": [{"desc", "bbox_xyxy_px", "score"}]}` |
| `gt_vs_pred` | this project's predictions file |
| `yolo` | a folder of `<image>.txt`, lines `class cx cy w h score` in fractions of the image |
| `csv` | columns `image`, `label`, `x1`, `y1`, `x2`, `y2` in pixels and `score`; as JSON a list of such rows |
| a family of `answers.py` | raw answers of a vision-language model: `{"image", "answer"}` |

Images are identified by id, path, file name or stem, labels by name or through a mapping.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coordexp.config.formats import Family, Form
from coordexp.config.paths import GT_VS_PRED
from coordexp.errors import DataError
from coordexp.evaluation.foreign.answers import FAMILIES, read_answer
from coordexp.evaluation.foreign.truth import Truth, TruthImage, xywh_box, xyxy_box
from coordexp.infra.foreign import Gate, shown
from coordexp.records.gt_vs_pred import ImageResult, ParseReport, Prediction, read_results
from coordexp.records.prediction_log import checked_row

PREDICTIONS = Gate("predictions of a detector", DataError, "docs/evaluate.md lists the forms.", max_bytes=1 << 32)
NO_SCORE = 1.0  # score of all objects of a model without scores: AP then ranks by image and generation order


@dataclass(frozen=True, slots=True)
class Answered:
    """The predictions for one image; only detectors that answer in text have `parse` and `raw_text`."""

    pred: list[Prediction] = field(default_factory=list)
    parse: ParseReport | None = None
    raw_text: str = ""


@dataclass(frozen=True, slots=True)
class Predictions:
    """The results of all images of a `Truth`, and notes for the reader."""

    results: list[ImageResult]
    notes: tuple[str, ...]


def read_predictions(
    path: Path, truth: Truth, form: Form | None = None, labels: Mapping[str, str] | None = None
) -> Predictions:
    """Read a file or folder of predictions and join them with the annotations.

    Args:
        path: the output of a detector.
        truth: the annotations; an annotated image without predictions counts as empty.
        form: one of the forms above; None recognizes all except raw answers of a model.
        labels: their label -> ours, for labels that differ.

    Raises:
        DataError: an invalid image, class id or box, or a missing score; named by file and line or entry.
    """
    form = form or recognize(path)
    answered = _answered(path, truth, form)
    renamed = labels or {}
    results = [_result(image, answered.get(image.image_id), renamed) for image in truth.images]
    if form in FAMILIES and any(answered.get(image.image_id) is None for image in truth.images):
        results = [replace(r, parse=r.parse or ParseReport(False, 0)) for r in results]
    return Predictions(results, tuple(_notes(path, truth, form, answered)))


def recognize(path: Path) -> Form:
    """The form of a file, from its suffix and first line; raises DataError if it is unknown."""
    if path.is_dir():
        return "yolo"
    if path.suffix == ".csv":
        return "csv"
    if path.suffix == ".json":
        return "coco"
    _, row = next(PREDICTIONS.json_lines(path), ("", None))
    keys = set(row) if isinstance(row, dict) else set()
    if {"gt", "pred"} <= keys:
        return "gt_vs_pred"
    if {"image", "objects"} <= keys:
        return "lines"
    raise DataError(
        f"{path}:1: keys {sorted(keys)[:8]}; expected those of gt_vs_pred or of `predict --out`. For raw answers of a "
        f"model, set --form {' | '.join(FAMILIES)}."
    )


def _answered(path: Path, truth: Truth, form: Form) -> dict[int, Answered]:
    if form in FAMILIES:
        return _of_answers(path, truth, form)
    readers: dict[str, Callable[[Path, Truth], dict[int, Answered]]] = {
        "coco": _of_coco, "lines": _of_lines, "gt_vs_pred": _of_results, "yolo": _of_yolo, "csv": _of_csv,
    }  # fmt: skip
    return readers[form](path, truth)


def _result(image: TruthImage, found: Answered | None, labels: Mapping[str, str]) -> ImageResult:
    found = found or Answered()
    pred = tuple(replace(p, desc=labels.get(p.desc, p.desc)) for p in found.pred)
    return ImageResult(
        image_id=image.image_id, image=image.image, width=image.width, height=image.height, gt=image.gt, pred=pred,
        raw_text=found.raw_text, parse=found.parse,
    )  # fmt: skip


def _notes(path: Path, truth: Truth, form: Form, answered: Mapping[int, Answered]) -> Iterator[str]:
    silent = sum(image.image_id not in answered for image in truth.images)
    if silent and form not in ("coco", "csv"):  # these have no entry for an image without detections
        yield f"{path}: no entry for {silent} of {len(truth.images)} images; they are evaluated as empty."
    if form in FAMILIES:
        yield f"{path}: the answers have no scores; AP ranks them by image and generation order."


def _of_coco(path: Path, truth: Truth) -> dict[int, Answered]:
    """COCO results, with the ids of the annotations; or instances with their own ids, which are joined by name."""
    source = PREDICTIONS.read_json(path)
    if isinstance(source, dict) and isinstance(source.get("annotations"), list):
        try:
            files = {row["id"]: str(row["file_name"]) for row in source["images"]}
            names = {row["id"]: str(row["name"]) for row in source["categories"]}
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: images need id and file_name, categories id and name ({error!r}).") from error
        source = source["annotations"]
    else:
        files, names = {}, {category.id: category.name for category in truth.categories}
    if not isinstance(source, list):
        raise DataError(f"{path}: found a {type(source).__name__}, expected COCO results: a list of detections.")
    if source and isinstance(source[0], dict) and "bbox" not in source[0] and set(_COLUMNS["x1"]) & source[0].keys():
        placed = ((f"{path}: [{n}]", row if isinstance(row, dict) else {}) for n, row in enumerate(source))
        return _of_rows(placed, list(source[0]), path, truth)
    answered: dict[int, Answered] = {}
    for n, row in enumerate(source):
        where = f"{path}: [{n}]"
        if not isinstance(row, dict):
            raise DataError(f"{where}: found {row!r}, expected a detection with image_id, category_id, bbox and score.")
        key, category = row.get("image_id"), row.get("category_id")
        image_id = truth.image_id(files.get(key, key) if isinstance(key, int | str) else key, where)
        if not isinstance(category, int | str) or category not in names:
            raise DataError(
                f"{where}: category_id {category!r} is none of the {len(names)} ids that the annotations declare "
                f"({_some(sorted(names))}). Detectors often count classes from 0; convert to the annotations' ids."
            )
        desc, box = names[category], xywh_box(row.get("bbox"), where)
        answered.setdefault(image_id, Answered()).pred.append(Prediction(desc, box, score=_score(row, where)))
    return answered


def _of_lines(path: Path, truth: Truth) -> dict[int, Answered]:
    sizes = truth.sizes_wh_px
    answered: dict[int, Answered] = {}
    for where, row in _json_lines(path):
        image_id = truth.image_id(row.get("image"), where)
        if image_id in answered:
            raise DataError(f"{where}: image {row['image']!r} appears twice, expected one line per image.")
        if "width" in row and (row["width"], row.get("height")) != sizes[image_id]:
            raise DataError(
                f"{where}: predicted on {row['width']} x {row.get('height')} px, annotated as "
                f"{sizes[image_id][0]} x {sizes[image_id][1]} px; the boxes have different coordinates. Predict on the "
                "annotated images."
            )
        objects = row.get("objects")
        if not isinstance(objects, list) or not all(isinstance(o, dict) for o in objects):
            raise DataError(f"{where}: objects is {objects!r}, expected a list.")
        pred = [
            Prediction(_label(o.get("desc"), where), xyxy_box(o.get("bbox_xyxy_px"), where), score=_score(o, where))
            for o in objects
        ]
        answered[image_id] = Answered(pred, _parse_report(row.get("parse"), where), str(row.get("raw_text", "")))
    return answered


def _of_results(path: Path, truth: Truth) -> dict[int, Answered]:
    return {
        truth.image_id(r.image_id, str(path)): Answered(list(r.pred), r.parse, r.raw_text) for r in read_results(path)
    }


def _of_yolo(folder: Path, truth: Truth) -> dict[int, Answered]:
    """Lines `class cx cy w h score`; classes count from 0 in the order of the annotations' ids."""
    sizes = truth.sizes_wh_px
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(f"{folder}: no *.txt with predictions; expected one file per image.")
    answered: dict[int, Answered] = {}
    for file in files:
        image_id = truth.image_id(file.stem, str(file))
        scale = sizes[image_id] * 2
        pred = answered.setdefault(image_id, Answered()).pred
        for number, line in enumerate(PREDICTIONS.read_text(file).splitlines(), 1):
            if line.strip():
                pred.append(_yolo_prediction(line, truth, scale, f"{file}:{number}"))
    return answered


def _yolo_prediction(line: str, truth: Truth, scale: tuple[int, ...], where: str) -> Prediction:
    try:
        label, cx, cy, w, h, score = (float(v) for v in line.split())
    except ValueError as error:
        raise DataError(
            f"{where}: {line.strip()!r}, expected `class cx cy w h score` (with save_conf=True, YOLO writes the score)."
        ) from error
    if not label.is_integer() or not 0 <= label < len(truth.categories):
        raise DataError(f"{where}: class {label:g}, expected 0 to {len(truth.categories) - 1} as in the annotations.")
    fractions = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    box = xyxy_box([fraction * side for fraction, side in zip(fractions, scale, strict=True)], where)
    return Prediction(truth.categories[int(label)].name, box, score=_score({"score": score}, where))


_COLUMNS = {
    "image": ("image", "file_name", "image_id", "filename"),
    "label": ("label", "desc", "class_name", "class"),
    "x1": ("x1", "x_min", "xmin"),
    "y1": ("y1", "y_min", "ymin"),
    "x2": ("x2", "x_max", "xmax"),
    "y2": ("y2", "y_max", "ymax"),
    "score": ("score", "confidence"),
}


def _of_csv(path: Path, truth: Truth) -> dict[int, Answered]:
    with path.open(newline="", encoding="utf-8-sig") as text:
        rows = csv.DictReader(text)
        numbered = ((f"{path}:{number}", row) for number, row in enumerate(rows, 2))
        return _of_rows(numbered, list(rows.fieldnames or ()), path, truth)


def _of_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], columns: Sequence[str], path: Path, truth: Truth
) -> dict[int, Answered]:
    """One prediction per row; each row comes with its location for messages."""
    answered: dict[int, Answered] = {}
    names = {key: next((n for n in forms if n in columns), "") for key, forms in _COLUMNS.items()}
    if absent := [key for key, name in names.items() if not name]:
        raise DataError(f"{path}: no column {absent[0]!r} in {list(columns)}; expected {list(_COLUMNS)}.")
    for where, row in rows:
        box = xyxy_box([row.get(names[key]) for key in ("x1", "y1", "x2", "y2")], where)
        label, score = _label(row.get(names["label"]), where), _score({"score": row.get(names["score"])}, where)
        key = row.get(names["image"])
        image_id = truth.image_id(_integer(key, where) if names["image"] == "image_id" else key, where)
        answered.setdefault(image_id, Answered()).pred.append(Prediction(label, box, score=score))
    return answered


def _of_answers(path: Path, truth: Truth, family: Family) -> dict[int, Answered]:
    sizes = truth.sizes_wh_px
    answered: dict[int, Answered] = {}
    for where, row in _json_lines(path):
        text = next((row[key] for key in _ANSWER_KEYS if key in row), None)
        if not isinstance(text, str):
            raise DataError(f"{where}: no text found, expected one under one of the keys {', '.join(_ANSWER_KEYS)}.")
        image_id = truth.image_id(row.get("image", row.get("image_id")), where)
        found = read_answer(text, family, *sizes[image_id])
        pred = [Prediction(o.label, o.bbox_xyxy_px, score=NO_SCORE) for o in found.objects]
        answered[image_id] = Answered(pred, found.report, text)
    return answered


_ANSWER_KEYS = ("answer", "response", "text", "output", "generated_text")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, row in PREDICTIONS.json_lines(path):
        if not isinstance(row, dict):
            PREDICTIONS.refuse(where, f"holds {shown(row)}, not a JSON object")
        yield where, checked_row(row, where)


def _score(row: Mapping[str, Any], where: str) -> float:
    value = row.get("score")
    try:
        score = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{where}: score {value!r}, expected a finite number: AP ranks by it, and none is invented.")
    return score


def _integer(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: image_id {value!r}, expected an integer.") from error


def _label(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: label {value!r}, expected a text.")
    return value


def _parse_report(value: Any, where: str) -> ParseReport | None:
    if value is None:
        return None
    try:
        return ParseReport(**value)
    except TypeError as error:
        raise DataError(f"{where}: parse is {value!r}, expected the counters that `predict --out` writes.") from error


def _some(values: list[Any]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def read_labels(path: Path) -> dict[str, str]:
    """A mapping of labels, theirs -> ours; raises DataError unless it is a JSON object of texts."""
    value = PREDICTIONS.read_json(path)
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise DataError(f'{path}: expected a JSON object of labels, such as {{"person": "human"}}.')
    return value


def labels_of(files: Sequence[Path]) -> list[str]:
    """A short, unique name for each file: its stem, or the folder of a run's predictions file."""
    parts = [
        file.resolve().parent.parts if file.name == GT_VS_PRED else file.resolve().with_suffix("").parts
        for file in files
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{file} ({n})" for n, file in enumerate(files, 1)]
