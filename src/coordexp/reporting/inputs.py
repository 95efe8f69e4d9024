"""The inputs of a report: the files of one profile, read once and checked.

A report reads files only, never a model. If a file is missing or is not what its stage writes, the report stops and
names the stage to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coordexp.config.paths import (
    CHECKPOINTS,
    COMPARISONS,
    CONTEXT_ROWS,
    DECODE_SUMMARY,
    GT_VS_PRED,
    RUN_METADATA,
    TRAIN_LOG,
)
from coordexp.config.run import RunConfig
from coordexp.config.schema import EvalParams
from coordexp.errors import DataError, closest
from coordexp.evaluation.registry import metric_specs
from coordexp.infra.artefacts import read_hashes
from coordexp.infra.foreign import Gate
from coordexp.infra.logs import read_log, read_rows
from coordexp.infra.provenance import decides_answer
from coordexp.records.categories import Category, read_categories
from coordexp.records.gt_vs_pred import ImageResult, own_lines, read_results
from coordexp.rollout.scoring import ANSWERS, read_decoded

Json = dict[str, Any]
Distributions: TypeAlias = NDArray[np.float16]  # (N predictions, 4 coordinates, 1000 bins)
Metrics: TypeAlias = pd.DataFrame  # "area.metric" by checkpoint; intervals under "interval.area.metric"
TRAINED = ("stage1", "stage1-control", "stage2")
EVALUATION_KEYS = frozenset(
    {"images", "objects", "predictions", "right", "false", "missed", "precision", "recall", "f1"}
    | {"f1_boxes", "dup_pairs_90", "parse_rate", "truncated"}
)
CONTEXT_KEYS = frozenset({"image_id", "text_ce", "text_tokens", "A1", "own"})


@dataclass(frozen=True, slots=True)
class Baseline:
    """The commit that an experiment started from: the settings in it."""

    revision: str
    experiment: str  # its name; empty where DVC gives none
    settings: Mapping[str, Any]  # params.yaml and, under its file name, the profile
    profile: Mapping[str, Any] = field(default_factory=dict)  # the profile as it is now, under its file name


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """The run that a report covers, and the paths of its files.

    `evaluations` contains a folder per checkpoint (gt_vs_pred.jsonl, per_image.json, pr_curve.json, details.json,
    decode.json), `runs` one per training stage (train_log.jsonl, monitor.jsonl, context_errors.jsonl,
    run_metadata.json). Image paths of the records are relative to `image_root`.
    """

    run: RunConfig
    metrics: Path
    evaluations: Path
    runs: Path
    rollout_summary: Path
    packing_stats: Path
    upper_bound: Path
    drops: Path
    categories: Path
    image_root: Path
    decoded: Path  # answers of the last checkpoint with their distributions
    baseline: Baseline | None = None  # of the experiment, if this is one

    @classmethod
    def of(cls, run: RunConfig, baseline: Baseline | None = None) -> ReportInputs:
        """The files at the paths where the stages of a profile write them."""
        paths = run.paths
        return cls(
            run=run,
            metrics=paths.metrics,
            evaluations=paths.run("eval"),
            runs=paths.run("stage1").parent,
            rollout_summary=paths.rollout_summary,
            packing_stats=paths.packed / "stats.json",
            upper_bound=paths.run("eval") / "upper_bound.json",
            drops=paths.records / "drops.json",
            categories=paths.records / "categories.json",
            image_root=paths.raw,
            decoded=paths.decoded(CHECKPOINTS[-1]),
            baseline=baseline,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All inputs; mappings are keyed by checkpoint or training stage."""

    run: RunConfig
    metrics: Metrics
    comparison: dict[str, dict[str, Json | None]]  # comparison -> metric -> delta, lo, hi, p_superior
    results: dict[str, list[ImageResult]]
    probes: list[ImageResult]  # further prompts, answered by the last checkpoint
    distributions: dict[int, Distributions]  # of the last checkpoint by image id; empty where its codec has none
    per_image: dict[str, pd.DataFrame]  # by image id
    pr_curves: dict[str, Json]
    details: dict[str, Json]
    decodes: dict[str, Json]
    logs: dict[str, pd.DataFrame]
    dev_rows: dict[str, list[Json] | None]  # results of the eval callback; None if the run wrote no file
    contexts: dict[str, list[Json] | None]  # its errors of coordinates by context, one row per image and evaluation
    metadata: dict[str, Json]
    rollout: Json
    packing: Json
    upper_bound: Json
    drops: Json
    categories: tuple[Category, ...]

    @property
    def settings(self) -> EvalParams:
        """How the predictions were evaluated."""
        return self.run.params.eval


def load_report_data(inputs: ReportInputs) -> ReportData:
    """Read all files of a report.

    Raises:
        DataError: a file or a checkpoint is missing or damaged; names the file and the stage that writes it.
    """
    metrics = read_json(inputs.metrics, "coco-eval")
    folders = {name: inputs.evaluations / name for name in CHECKPOINTS}
    lines = {name: _lines(folder / GT_VS_PRED) for name, folder in folders.items()}
    return ReportData(
        run=inputs.run,
        metrics=_metrics(metrics, inputs),
        comparison={name: _comparison(metrics, name, inputs.metrics) for name in COMPARISONS},
        results={name: own_lines(found) for name, found in lines.items()},
        probes=[line for line in lines[CHECKPOINTS[-1]] if line.probe],
        distributions=_distributions(inputs.decoded),
        per_image={name: _per_image(folder / "per_image.json") for name, folder in folders.items()},
        pr_curves={name: read_json(folder / "pr_curve.json", "coco-eval") for name, folder in folders.items()},
        details={name: read_json(folder / "details.json", "coco-eval") for name, folder in folders.items()},
        decodes={name: read_json(folder / DECODE_SUMMARY, "coco-eval") for name, folder in folders.items()},
        logs={name: read_log(_existing(inputs.runs / name / TRAIN_LOG, name)) for name in TRAINED},
        dev_rows={name: _rows(inputs.runs / name / "monitor.jsonl", EVALUATION_KEYS) for name in TRAINED},
        contexts={name: _rows(inputs.runs / name / CONTEXT_ROWS, CONTEXT_KEYS) for name in TRAINED},
        metadata={name: _metadata(inputs.runs / name, name) for name in TRAINED},
        rollout=_gate("stage2").read_sealed(_existing(inputs.rollout_summary, "stage2")),
        packing=read_json(inputs.packing_stats, "pack"),
        upper_bound=read_json(inputs.upper_bound, "coco-eval"),
        drops=read_json(inputs.drops, "convert"),
        categories=read_categories(_existing(inputs.categories, "convert")),
    )


def metrics_frame(areas: Mapping[str, Json]) -> pd.DataFrame:
    """Metrics by "area.metric" and checkpoint, from checkpoint -> area -> metric; values keep their types."""
    columns = {
        name: {f"{area}.{key}": value for area, values in by_area.items() for key, value in values.items()}
        for name, by_area in areas.items()
    }
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})


def metric(metrics: Metrics, checkpoint: str, key: str) -> Any:
    """The value of "area.metric"; raises DataError if the evaluation did not write it."""
    try:
        return metrics.at[key, checkpoint]
    except KeyError as error:
        raise DataError(
            f"metrics.json: {checkpoint}.eval.{key} is missing. Run `dvc repro coco-eval` under the present parameters."
        ) from error


def bounds_of(metrics: Metrics, checkpoint: str, key: str) -> list[float] | None:
    """The 95 % interval of a metric; None if it has none."""
    name = f"interval.{key}"
    return metrics.at[name, checkpoint] if name in metrics.index else None


def read_json(path: Path, stage: str) -> Json:
    """Read a JSON object that `stage` writes; raises DataError if it does not exist."""
    value = _json(path, stage)
    if not isinstance(value, dict):
        raise DataError(f"{path}: found a {type(value).__name__}, expected a JSON object. Run `dvc repro {stage}`.")
    return value


def required(tree: Json, key: str, file: str) -> Any:
    """A key that a file must have; raises DataError naming both."""
    if key not in tree:
        raise DataError(f"{file}: key {key!r} is missing, found {', '.join(tree) or 'none'}. Run its stage again.")
    return tree[key]


def _existing(path: Path, stage: str) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; the stage `{stage}` writes it. Run `dvc repro {stage}`, then the report."
        )
    return path


def _json(path: Path, stage: str) -> Any:
    return _gate(stage).read_json(_existing(path, stage))


def _gate(stage: str) -> Gate:
    return Gate(f"what the stage `{stage}` writes", DataError, f"Run `dvc repro {stage}`.")


def _metadata(folder: Path, stage: str) -> Json:
    """The run metadata of a checkpoint, with the hashes of the files that determine its answers."""
    hashes = read_hashes(folder)
    digests = hashes.digests if hashes else {}
    files = {name: digest[:16] for name, digest in digests.items() if decides_answer(name)}
    return read_json(folder / RUN_METADATA, stage) | {"files": files}


def _metrics(metrics: Json, inputs: ReportInputs) -> pd.DataFrame:
    present = [name for name in metrics if name != "comparison"]
    wanted = dict.fromkeys(key.split(".")[0] for key in metric_specs(inputs.run.params.eval))
    for name in CHECKPOINTS:
        if name not in metrics:
            raise DataError(
                f"{inputs.metrics}: no metrics of checkpoint {name!r}; found {', '.join(present) or 'none'}."
                f"{closest(name, present)} A report compares {', '.join(CHECKPOINTS)}. Run `dvc repro coco-eval`."
            )
        if missing := [area for area in wanted if area not in metrics[name].get("eval", {})]:
            raise DataError(f"{inputs.metrics}: {name}.eval lacks {', '.join(missing)}. Run `dvc repro coco-eval`.")
    return metrics_frame({name: metrics[name]["eval"] for name in CHECKPOINTS})


def _comparison(metrics: Json, name: str, path: Path) -> dict[str, Json | None]:
    compared = metrics.get("comparison", {})
    if name not in compared:
        raise DataError(f"{path}: comparison.{name} is missing, found {sorted(compared)}. Run `dvc repro coco-eval`.")
    return cast("dict[str, Json | None]", compared[name])


def _lines(path: Path) -> list[ImageResult]:
    return sorted(read_results(_existing(path, "coco-eval")), key=lambda result: result.image_id)


def _distributions(folder: Path) -> dict[int, Distributions]:
    """By image id, of the answers to the first prompt of each image; the file stays on disk until one is used."""
    _existing(folder / ANSWERS, f"decode@{CHECKPOINTS[-1]}")
    return {
        decoded.result.image_id: decoded.probs_N4K
        for decoded in read_decoded(folder)
        if decoded.probs_N4K is not None and not decoded.result.probe
    }


def _rows(path: Path, keys: frozenset[str]) -> list[Json] | None:
    return read_rows(path, keys) if path.is_file() else None


def _per_image(path: Path) -> pd.DataFrame:
    rows = _json(path, "coco-eval")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "image_id" in row for row in rows):
        raise DataError(
            f"{path}: expected a list of objects with an image_id, one per image. Run `dvc repro coco-eval`."
        )
    return pd.DataFrame(rows).set_index("image_id").sort_index()
