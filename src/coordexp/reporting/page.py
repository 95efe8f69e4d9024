"""One self-contained HTML page for browsing predictions: no network, no server, images and data inside the file.

It has a sortable row per image. A click shows annotations and predictions with scores and the stored statistics of the
coordinate distributions; all panels zoom together. Filters select by run, name, error type, size and score, and the
address contains the state. The page's own script writes all text through text nodes, so that no name can act as markup.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from coordexp.config.schema import EvalParams
from coordexp.errors import DataError
from coordexp.evaluation.details import per_image
from coordexp.evaluation.error_causes import Cause
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.protocol import STANDARD, STANDARD_MATCHING, STANDARD_SEED, iou_key
from coordexp.evaluation.registry import metric_specs
from coordexp.evaluation.set_behaviour import find_duplicates
from coordexp.infra.files import write_text
from coordexp.infra.printable import printable_tree
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult, Prediction, own_lines
from coordexp.records.images import read_record_rgb
from coordexp.reporting.inputs import Json
from coordexp.reporting.outcomes import Outcomes, judge

MAX_RUNS = 6
TOTALS = ("coco.mAP", "coco.AP50", "f1.full_50")
_DATA = "/*DATA*/"


@dataclass(frozen=True, slots=True)
class PageSettings:
    """Bounds on the size of the page: the number of images and their longer side in pixels."""

    images: int = 500
    side_px: int = 256
    jpeg_quality: int = 72


def write_page(
    results: Mapping[str, Sequence[ImageResult]],
    categories: Sequence[Category],
    image_root: Path,
    out: Path,
    params: EvalParams = STANDARD,
    page: PageSettings | None = None,
    records: Sequence[Json] = (),
) -> int:
    """Write the page of up to MAX_RUNS runs, by their labels, on the same images; returns its size in bytes.

    With more images than `page.images`, those with the lowest F1 of the first run are kept, and the page reports this.
    `records` are the run records of the stages: commit, time and machine.

    Raises:
        DataError: no run or too many, runs on different images, or an image that does not exist.
    """
    if not 1 <= len(results) <= MAX_RUNS:
        raise DataError(f"found {len(results)} files of predictions, expected one to {MAX_RUNS}.")
    page = page or PageSettings()
    results = {label: own_lines(rows) for label, rows in results.items()}
    data = page_data(results, categories, params, page.images)
    for row in data["images"]:
        row["src"] = _inline(image_root, row["image"], page)
    data["provenance"] = [_provenance(record) for record in records]
    write_text(out, render_page(data))
    return out.stat().st_size


def render_page(data: dict[str, Any]) -> str:
    """The page with its data; all text is printable, and `<` is escaped so that no text can end the script element."""
    template = resources.files("coordexp.reporting").joinpath("templates", "page.html").read_text(encoding="utf-8")
    assert template.count(_DATA) == 1
    text = json.dumps(printable_tree(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return template.replace(_DATA, text.replace("<", "\\u003c"))


def page_data(
    results: Mapping[str, Sequence[ImageResult]], categories: Sequence[Category], params: EvalParams, limit: int
) -> dict[str, Any]:
    """Everything on the page except the images: labels, totals, names, and a row per image with its boxes."""
    outcomes = {label: judge(rows, categories, params) for label, rows in results.items()}
    labels = list(results)
    ids = {label: tuple(r.image_id for r in outcome.results) for label, outcome in outcomes.items()}
    if len(set(ids.values())) > 1:
        raise DataError(f"{' and '.join(labels)} contain different images; only the same images can be paired.")
    dup_key = f"dup_pairs_{iou_key(min(params.duplicate_ious))}"
    tables = {label: _rows(outcome, params) for label, outcome in outcomes.items()}
    order = sorted(ids[labels[0]], key=lambda i: (tables[labels[0]][i]["f1_full_50"], i))[:limit]
    lines = [r for rows in results.values() for r in rows]
    names = sorted({o.desc for r in lines for o in r.gt} | {p.desc for r in lines for p in r.pred})
    images = [_image(i, outcomes, tables, dup_key) for i in sorted(order)]
    totals = [_totals(results[label], categories, params) for label in labels]
    shown = {"labels": labels, "totals": totals, "names": names, "n_all": len(ids[labels[0]]), "images": images}
    return shown | {"provenance": []}


def _totals(results: Sequence[ImageResult], categories: Sequence[Category], params: EvalParams) -> list[list[Any]]:
    """Name, value and 95 % interval of the summary metrics of a run over all its images; None if undefined."""
    found, specs = evaluate(results, categories, params, STANDARD_MATCHING, STANDARD_SEED), metric_specs(params)
    rows = []
    for key in TOTALS:
        interval = found.metrics["interval"][key]
        rows.append(
            [
                specs[key].name,
                *(None if v is None else round(v, 3) for v in (found.value(key), *(interval or (None, None)))),
            ]
        )
    return rows


def _rows(outcome: Outcomes, params: EvalParams) -> dict[int, dict[str, Any]]:
    duplicates = find_duplicates(outcome.table, min(params.duplicate_ious))
    rows = per_image(outcome.results, outcome.table, outcome.matches, duplicates, params)
    return {row["image_id"]: row for row in rows}


def _image(
    image_id: int, outcomes: dict[str, Outcomes], tables: dict[str, dict[int, dict[str, Any]]], dup_key: str
) -> dict[str, Any]:
    first = next(iter(outcomes.values())).of_image(image_id)[0]
    runs = []
    for label, outcome in outcomes.items():
        result, preds, objects = outcome.of_image(image_id)
        row = tables[label][image_id]
        runs.append(
            {
                "f1": round(row["f1_full_50"], 3),
                "dup": row[dup_key],
                "fp": row["fp_50"],
                "miss": row["fn_50"],
                "parse": result.parse is None or result.parse.ok,
                "pred": [
                    _prediction(pred, Cause(cause), None if row < 0 else row - objects.start)
                    for pred, cause, row in zip(
                        result.pred, outcome.cause_P[preds].tolist(), outcome.object_P[preds].tolist(), strict=True
                    )
                ],
            }
        )
    gt = [{"desc": g.desc, "box": _tenths(g.bbox_xyxy_px), "crowd": g.iscrowd, "area": g.area_px2} for g in first.gt]
    size = {"w": first.width, "h": first.height}
    return {"id": image_id, "image": first.image, **size, "gt": gt, "runs": runs}


def _prediction(pred: Prediction, cause: Cause, place: int | None) -> dict[str, Any]:
    """The stored values of a prediction; `object` is the place of the object that its error type refers to."""
    shown: dict[str, Any] = {"desc": pred.desc, "box": _tenths(pred.bbox_xyxy_px), "cause": cause.name.lower()}
    shown |= {"object": place, "score": None if pred.score is None else round(pred.score, 4)}
    shown["bins"] = list(pred.bins or ())
    if pred.coord_logprobs is not None:
        shown["logprob"] = [round(v, 2) for v in pred.coord_logprobs]
    if pred.coord_sd_bins is not None:
        shown["sd"] = [round(v, 1) for v in pred.coord_sd_bins]
    if "expectation" in pred.boxes_xyxy_px:
        shown["mean"] = _tenths(pred.boxes_xyxy_px["expectation"])
    return shown


def _provenance(record: Json) -> list[str]:
    """The cells of one stage: name, commit, end time, seconds, machine; empty where the record has no value."""
    git, machine = record.get("git") or {}, record.get("hardware") or {}
    state = {True: ", with uncommitted changes", None: ", state unknown"}.get(git.get("dirty"), "")
    seconds = record.get("wall_seconds")
    return [
        str(record.get("stage", "")),
        f"{git['commit'][:12]}{state}" if git.get("commit") else "",
        str(record.get("finished", "")),
        "" if seconds is None else f"{seconds:.0f}",
        ", ".join(f"{key} {value}" for key, value in machine.items()),
        ", ".join(f"{key} {value}" for key, value in (record.get("versions") or {}).items()),
    ]


def _tenths(box: Sequence[float]) -> list[float]:
    return [round(v, 1) for v in box]


def _inline(image_root: Path, name: str, page: PageSettings) -> str:
    try:
        image = read_record_rgb(image_root, name)
    except DataError as error:
        raise DataError(f"{error} If it is in another folder, pass that folder with --images.") from error
    image.thumbnail((page.side_px, page.side_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=page.jpeg_quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
