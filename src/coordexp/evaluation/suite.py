"""The evaluation of a run: every checkpoint on val, the paired comparisons, and their output files.

headline.json has the few numbers that `dvc metrics diff` shows, under the keys of metrics.json, because a table of all
slightly changed values would hide the decisive ones. It omits the base model, which no experiment trains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from coordexp.config.paths import CHECKPOINTS, COMPARISONS, GT_VS_PRED, ProfilePaths
from coordexp.config.schema import EvalParams, Params
from coordexp.evaluation.comparison import compare
from coordexp.evaluation.evaluator import Evaluation, evaluate, rounded
from coordexp.evaluation.lvis import federated_of
from coordexp.evaluation.registry import view
from coordexp.evaluation.table import check_known_images
from coordexp.evaluation.upper_bound import codec_upper_bound
from coordexp.infra.files import write_text
from coordexp.infra.provenance import write_json
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import read_results
from coordexp.records.schema import read_records


def evaluate_run(params: Params, paths: ProfilePaths) -> dict[str, Any]:
    """Evaluate the predictions file of every checkpoint; write metrics, per-image rows, curves and upper bound."""
    categories = read_categories(paths.records / "categories.json")
    records = list(read_records(paths.records / "val.jsonl"))
    known = {record.metadata["image_id"] for record in records if "image_id" in record.metadata}
    own = [record for record in records if "probe" not in record.metadata]
    federated = federated_of(own, categories)
    evaluations: dict[str, Evaluation] = {}
    for name in CHECKPOINTS:
        folder = paths.evaluation(name)
        results = list(read_results(folder / GT_VS_PRED))
        if known:  # records without ids are numbered when they are read
            check_known_images(results, known, str(paths.records / "val.jsonl"))
        evaluation = evaluate(results, categories, params.eval, params.matching, params.seed, federated)
        write_json(folder / "per_image.json", evaluation.per_image)
        write_json(folder / "pr_curve.json", rounded(evaluation.pr_curve))
        write_json(folder / "details.json", rounded(evaluation.details))
        evaluations[name] = evaluation
    write_json(paths.run("eval") / "upper_bound.json", rounded(codec_upper_bound(own)))
    metrics: dict[str, Any] = {name: {"eval": rounded(e.metrics)} for name, e in evaluations.items()}
    metrics["comparison"] = {
        key: rounded(compare(evaluations[new], evaluations[old])) for key, (new, old) in COMPARISONS.items()
    }
    write_json(paths.metrics, metrics)
    write_json(paths.reports / "headline.json", headline(metrics, params.eval))
    _write_pr_curve(evaluations["stage2"], paths)
    return metrics


def _write_pr_curve(evaluation: Evaluation, paths: ProfilePaths) -> None:
    """Write recall and precision at IoU 0.5 as TSV for `dvc plots`; precision is an empty cell without objects."""
    curve = evaluation.pr_curve
    table = pd.DataFrame({"recall": curve["recall"], "precision": curve["precision_50"] or None})
    table["recall"] = table["recall"].map("{:.2f}".format)
    write_text(paths.curve("pr"), table.to_csv(sep="\t", index=False, float_format="%.4f"))


SUBJECTS = ("stage1", "stage1-control", "stage2")
DECIDING = ("stage2_vs_control", "coco.mAP")  # is stage 2 better than stage 1 with the same compute?


def headline(metrics: dict[str, Any], params: EvalParams) -> dict[str, Any]:
    """The part of metrics.json that `dvc metrics` reads: at most 15 values."""
    chosen: dict[str, Any] = {}
    for checkpoint in SUBJECTS:
        areas: dict[str, Any] = {}
        for key in view("headline", params):
            area, name = key.split(".", 1)
            areas.setdefault(area, {})[name] = metrics[checkpoint]["eval"][area][name]
        chosen[checkpoint] = {"eval": areas}
    pair, key = DECIDING
    difference = metrics["comparison"][pair][key]
    if difference is not None:
        shown = {name: difference[name] for name in ("delta", "lo", "hi")}
        chosen["comparison"] = {pair: {key: shown}}
    return chosen


# File name -> table of Evaluation.details.
CSV_TABLES = {
    "per_class.csv": "per_category",
    "by_area.csv": "by_area",
    "by_side_px.csv": "by_side_px",
    "by_gt_count.csv": "by_gt_count",
    "scores.csv": "scores",
    "thresholds.csv": "thresholds",
    "reliability.csv": "reliability",
    "worst_duplicates.csv": "worst_duplicates",
}


def write_tables(evaluation: Evaluation, folder: Path) -> None:
    """Write the CSV tables, per_image.json and pr_curve.json; undefined values are empty cells."""
    for name, key in CSV_TABLES.items():
        rows = pd.DataFrame(rounded(evaluation.details[key]), dtype=object)  # object keeps integers as integers
        write_text(folder / name, rows.to_csv(index=False))
    for name, value in (("per_image.json", evaluation.per_image), ("pr_curve.json", evaluation.pr_curve)):
        write_text(folder / name, json.dumps(rounded(value)) + "\n")
