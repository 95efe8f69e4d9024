"""The evaluation of a run: every checkpoint on val, the paired comparisons, and the files they fill."""

from __future__ import annotations

from typing import Any

from coordexp.config.paths import CHECKPOINTS, COMPARISONS, ProfilePaths
from coordexp.config.schema import Params
from coordexp.evaluation.comparison import compare
from coordexp.evaluation.evaluator import Evaluation, evaluate, rounded
from coordexp.evaluation.headline import headline
from coordexp.evaluation.input_checks import check_known_images
from coordexp.evaluation.lvis import federated_of
from coordexp.evaluation.upper_bound import codec_upper_bound
from coordexp.infra.files import write_text
from coordexp.infra.provenance import write_json
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import read_results
from coordexp.records.schema import read_records


def evaluate_run(params: Params, paths: ProfilePaths) -> dict[str, Any]:
    """Evaluate every checkpoint's hand-over file; writes metrics, per-image rows, curves, the codec's upper bound."""
    categories = read_categories(paths.records / "categories.json")
    records = list(read_records(paths.records / "val.jsonl"))
    known = {record.metadata["image_id"] for record in records if "image_id" in record.metadata}
    federated = federated_of(records, categories)
    evaluations: dict[str, Evaluation] = {}
    for name in CHECKPOINTS:
        folder = paths.evaluation(name)
        results = list(read_results(folder / "gt_vs_pred.jsonl"))
        if known:  # records without ids are numbered by their decoder
            check_known_images(results, known, str(paths.records / "val.jsonl"))
        evaluation = evaluate(results, categories, params.eval, params.matching, params.seed, federated)
        write_json(folder / "per_image.json", evaluation.per_image)
        write_json(folder / "pr_curve.json", rounded(evaluation.pr_curve))
        write_json(folder / "details.json", rounded(evaluation.details))
        evaluations[name] = evaluation
    write_json(paths.run("eval") / "upper_bound.json", rounded(codec_upper_bound(records)))
    metrics: dict[str, Any] = {name: {"eval": rounded(e.metrics)} for name, e in evaluations.items()}
    metrics["comparison"] = {
        key: rounded(compare(evaluations[new], evaluations[old])) for key, (new, old) in COMPARISONS.items()
    }
    write_json(paths.reports / "metrics.json", metrics)
    write_json(paths.reports / "headline.json", headline(metrics, params.eval))
    _write_pr_curve(evaluations["stage2"], paths)
    return metrics


def _write_pr_curve(evaluation: Evaluation, paths: ProfilePaths) -> None:
    """Recall and precision at IoU 0.5 as TSV for `dvc plots`; no precision (an empty cell) without objects."""
    curve = evaluation.pr_curve
    precision = [f"{p:.4f}" for p in curve["precision_50"]] or [""] * len(curve["recall"])
    rows = zip(curve["recall"], precision, strict=True)
    write_text(paths.curve("pr"), "recall\tprecision\n" + "".join(f"{r:.2f}\t{p}\n" for r, p in rows))
