"""What a report is made from: the files of one profile, read once and checked.

A report reads files only, never a model. A file that is missing, or is not what its stage writes, stops it with the
name of the stage to run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from coordexp.config.paths import CHECKPOINTS, COMPARISONS, ProfilePaths
from coordexp.config.schema import EvalParams, Params
from coordexp.errors import DataError, closest
from coordexp.records.categories import Category, read_categories
from coordexp.records.gt_vs_pred import ImageResult, read_results
from coordexp.reporting.baseline import Baseline
from coordexp.reporting.training_log import TrainingLog, read_rows, read_training_log

Json = dict[str, Any]
Metrics = Mapping[str, Json]  # checkpoint -> area -> metric
TRAINED = ("stage1", "stage1-control", "stage2")
LOOK_KEYS = frozenset(
    {"images", "objects", "predictions", "right", "false", "missed", "precision", "recall", "f1"}
    | {"f1_boxes", "dup_pairs_90", "parse_rate", "truncated", "seconds"}
)
AREAS = (
    *("coco", "known", "held_out", "f1", "protocol", "rollout", "parse", "input", "set", "guarded", "confidence"),
    "interval",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """Where the files of one report lie, and the parameters the run was made with.

    `evaluations` holds a folder per checkpoint (gt_vs_pred.jsonl, per_image.json, pr_curve.json, details.json,
    decode.json), `runs` one per training stage (train_log.jsonl, monitor.jsonl, run_metadata.json). Image paths of the
    records are relative to `image_root`.
    """

    profile: str
    metrics: Path
    evaluations: Path
    runs: Path
    rollout_summary: Path
    packing_stats: Path
    upper_bound: Path
    drops: Path
    categories: Path
    image_root: Path
    decoding_study: Path  # made on demand: may be absent
    params: Mapping[str, Any]  # params.yaml as the run resolved it
    gallery_images: int
    composed: bool = True  # the data are composed scenes, which no published number is about
    baseline: Baseline | None = None  # of the experiment, if this is one

    @classmethod
    def of(
        cls,
        paths: ProfilePaths,
        params: Mapping[str, Any],
        gallery_images: int,
        *,
        composed: bool = True,
        baseline: Baseline | None = None,
    ) -> ReportInputs:
        """The files where the stages of a profile write them."""
        return cls(
            profile=paths.profile,
            metrics=paths.reports / "metrics.json",
            evaluations=paths.run("eval"),
            runs=paths.run("stage1").parent,
            rollout_summary=paths.run("rollout") / "summary.json",
            packing_stats=paths.packed / "stats.json",
            upper_bound=paths.run("eval") / "upper_bound.json",
            drops=paths.records / "drops.json",
            categories=paths.records / "categories.json",
            image_root=paths.raw,
            decoding_study=paths.reports / "decoding.json",
            params=params,
            gallery_images=gallery_images,
            composed=composed,
            baseline=baseline,
        )

    @property
    def settings(self) -> EvalParams:
        """How the predictions were judged."""
        return Params.model_validate(dict(self.params)).eval


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything read; mappings are keyed by checkpoint or training stage."""

    metrics: dict[str, Json]  # checkpoint -> area -> metric
    comparison: dict[str, dict[str, Json | None]]  # comparison -> metric -> delta, lo, hi, p_superior
    results: dict[str, list[ImageResult]]
    per_image: dict[str, list[Json]]
    pr_curves: dict[str, Json]
    details: dict[str, Json]
    decodes: dict[str, Json]
    logs: dict[str, TrainingLog]
    dev_rows: dict[str, list[Json] | None]  # what the eval callback found; None if the run left no file of it
    metadata: dict[str, Json]
    rollout: Json
    packing: Json
    upper_bound: Json
    drops: Json
    decoding_study: Json | None
    categories: tuple[Category, ...]


def load_report_data(inputs: ReportInputs) -> ReportData:
    """Read all files of a report.

    Raises:
        DataError: a file or a checkpoint is missing or broken; it names the file and the stage that writes it.
    """
    metrics = read_json(inputs.metrics, "coco-eval")
    folders = {name: inputs.evaluations / name for name in CHECKPOINTS}
    return ReportData(
        metrics={name: _evaluation(metrics, name, inputs.metrics) for name in CHECKPOINTS},
        comparison={name: _comparison(metrics, name, inputs.metrics) for name in COMPARISONS},
        results={name: _results(folder / "gt_vs_pred.jsonl") for name, folder in folders.items()},
        per_image={name: _per_image(folder / "per_image.json") for name, folder in folders.items()},
        pr_curves={name: read_json(folder / "pr_curve.json", "coco-eval") for name, folder in folders.items()},
        details={name: read_json(folder / "details.json", "coco-eval") for name, folder in folders.items()},
        decodes={name: read_json(folder / "decode.json", "coco-eval") for name, folder in folders.items()},
        logs={name: read_training_log(_existing(inputs.runs / name / "train_log.jsonl", name)) for name in TRAINED},
        dev_rows={name: _dev_rows(inputs.runs / name / "monitor.jsonl") for name in TRAINED},
        metadata={name: read_json(inputs.runs / name / "run_metadata.json", name) for name in TRAINED},
        rollout=read_json(inputs.rollout_summary, "rollout"),
        packing=read_json(inputs.packing_stats, "pack"),
        upper_bound=read_json(inputs.upper_bound, "coco-eval"),
        drops=read_json(inputs.drops, "convert"),
        decoding_study=json.loads(inputs.decoding_study.read_text(encoding="utf-8"))
        if inputs.decoding_study.is_file()
        else None,
        categories=read_categories(_existing(inputs.categories, "convert")),
    )


def metric(metrics: Metrics, checkpoint: str, key: str) -> Any:
    """The value of "area.metric"; raises DataError if the evaluation did not write it."""
    area, name = key.split(".", 1)
    try:
        return metrics[checkpoint][area][name]
    except KeyError as error:
        raise DataError(
            f"metrics.json: {checkpoint}.eval.{key} is missing. Run `dvc repro coco-eval` under the present parameters."
        ) from error


def read_json(path: Path, stage: str) -> Json:
    """Read a JSON object that `stage` writes; raises DataError if there is none."""
    value = _json(path, stage)
    if not isinstance(value, dict):
        raise DataError(f"{path}: found a {type(value).__name__}, expected a JSON object. Run `dvc repro {stage}`.")
    return value


def _existing(path: Path, stage: str) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; the stage `{stage}` writes it. Run `dvc repro {stage}`, then the report."
        )
    return path


def _json(path: Path, stage: str) -> Any:
    try:
        return json.loads(_existing(path, stage).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON ({error.msg} at line {error.lineno}). Run `dvc repro {stage}`."
        ) from error


def _evaluation(metrics: Json, checkpoint: str, path: Path) -> Json:
    present = [name for name in metrics if name != "comparison"]
    if checkpoint not in metrics:
        raise DataError(
            f"{path}: no metrics of checkpoint {checkpoint!r}; found {', '.join(present) or 'none'}."
            f"{closest(checkpoint, present)} A report compares {', '.join(CHECKPOINTS)}. Run `dvc repro coco-eval`."
        )
    areas = metrics[checkpoint].get("eval", {})
    missing = [area for area in AREAS if area not in areas]
    if missing:
        raise DataError(f"{path}: {checkpoint}.eval lacks {', '.join(missing)}. Run `dvc repro coco-eval`.")
    return cast(Json, areas)


def _comparison(metrics: Json, name: str, path: Path) -> dict[str, Json | None]:
    compared = metrics.get("comparison", {})
    if name not in compared:
        raise DataError(f"{path}: comparison.{name} is missing, found {sorted(compared)}. Run `dvc repro coco-eval`.")
    return cast("dict[str, Json | None]", compared[name])


def _results(path: Path) -> list[ImageResult]:
    return sorted(read_results(_existing(path, "coco-eval")), key=lambda result: result.image_id)


def _dev_rows(path: Path) -> list[Json] | None:
    return read_rows(path, LOOK_KEYS) if path.is_file() else None


def _per_image(path: Path) -> list[Json]:
    rows = _json(path, "coco-eval")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "image_id" in row for row in rows):
        raise DataError(
            f"{path}: expected a list of objects with an image_id, one per image. Run `dvc repro coco-eval`."
        )
    return rows
