"""What decoding choices are worth: the alternatives that a gt_vs_pred file holds, evaluated beside each other.

Nothing is decoded again. Each row is a full evaluation of the same answers under another box rule or another score,
with the paired difference to a baseline; `between_runs` does the same for files that were decoded differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from coordexp.config.schema import Params
from coordexp.errors import DataError
from coordexp.evaluation.comparison import compare
from coordexp.evaluation.evaluator import Evaluation, evaluate
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult, Prediction

SHOWN = (
    *("coco.mAP", "coco.AP50", "coco.AP75", "coco.AP90", "coco.APs", "coco.APm", "coco.APl"),
    *("f1.full_50", "f1.full_95", "set.dup_pairs_90", "parse.parse_rate", "confidence.auroc_tp_fp", "confidence.ece"),
)

Row = dict[str, Any]


def box_table(results: Sequence[ImageResult], categories: Sequence[Category], params: Params) -> list[Row]:
    """The rules of `decode.box`, each with the scores as they are; compared with the emitted bins (argmax)."""
    return _table(_alternatives(results, "boxes_xyxy_px", with_box), "argmax", categories, params)


def score_table(results: Sequence[ImageResult], categories: Sequence[Category], params: Params) -> list[Row]:
    """The schemes of `decode.score`, each with the boxes as they are; compared with the coordinate log-probability."""
    return _table(_alternatives(results, "scores", with_score), "coord_logprob", categories, params)


def between_runs(
    runs: Mapping[str, Sequence[ImageResult]],
    baseline: str,
    categories: Sequence[Category],
    params: Params,
    extra: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """Files that were decoded differently on the same images, such as with and without constraints.

    Args:
        runs: name -> results.
        baseline: the name that the others are compared with.
        extra: name -> further columns, such as tokens per second.
    """
    rows = _table(runs, baseline, categories, params)
    return [row | dict(extra.get(row["name"], {})) for row in rows]


def with_box(prediction: Prediction, rule: str) -> Prediction:
    """The prediction with its box under another rule."""
    return replace(prediction, bbox_xyxy_px=prediction.boxes_xyxy_px[rule])


def with_score(prediction: Prediction, name: str) -> Prediction:
    """The prediction under another score."""
    return replace(prediction, score=prediction.scores[name])


def _alternatives(
    results: Sequence[ImageResult], field: str, change: Callable[[Prediction, str], Prediction]
) -> dict[str, list[ImageResult]]:
    """Name -> results with that alternative, for the names that every prediction has, in the order of the first."""
    held = [getattr(p, field) for r in results for p in r.pred]
    names = [name for name in (held[0] if held else {}) if all(name in alternatives for alternatives in held)]
    if not names:
        raise DataError(
            f"no alternative `{field}` in the predictions; decode again with this version, which stores them."
        )
    return {name: [replace(r, pred=tuple(change(p, name) for p in r.pred)) for r in results] for name in names}


def _table(
    variants: Mapping[str, Sequence[ImageResult]], baseline: str, categories: Sequence[Category], params: Params
) -> list[Row]:
    evaluations = {
        name: evaluate(results, categories, params.eval, params.matching, params.seed)
        for name, results in variants.items()
    }
    return [_row(name, evaluation, evaluations[baseline]) for name, evaluation in evaluations.items()]


def _row(name: str, evaluation: Evaluation, baseline: Evaluation) -> Row:
    row: Row = {"name": name, **{key: evaluation.value(key) for key in SHOWN}}
    if evaluation is not baseline:
        row["difference"] = {key: value for key, value in compare(evaluation, baseline).items() if value is not None}
    return row
