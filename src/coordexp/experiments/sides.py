"""Sides of a comparison, each one evaluated run or several, and what their paired difference amounts to.

A side maps "experiment checkpoint" to its evaluation, seed by seed in the same order as the other side. Predictions,
categories and parameters are those of the run's own revision, never of the workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from coordexp.config.paths import GT_VS_PRED, RUN_METADATA, ProfilePaths
from coordexp.config.schema import Params
from coordexp.config.study import METRICS, PRIMARY
from coordexp.errors import DataError
from coordexp.evaluation.blind import MARGIN, learned_nothing
from coordexp.evaluation.comparison import paired_effect
from coordexp.evaluation.effect import LEVEL, Effect, Verdict
from coordexp.evaluation.evaluator import Evaluation, evaluate
from coordexp.evaluation.parse import faults_of
from coordexp.experiments.runs import Repository
from coordexp.infra.foreign import Gate, shown
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import read_results

TRAINED = Gate("a JSON object with `tokens`", DataError, "Train the stage again.")
Side = Mapping[str, Evaluation]


def predictions_path(paths: ProfilePaths, checkpoint: str) -> str:
    """The judged predictions of a checkpoint on val, an output of the graph."""
    return (paths.evaluation(checkpoint) / GT_VS_PRED).as_posix()


def categories_path(paths: ProfilePaths) -> str:
    """The categories of the data set, an output of the graph."""
    return (paths.records / "categories.json").as_posix()


def evaluate_revision(repository: Repository, revision: str, checkpoint: str, draws: Params) -> Evaluation:
    """A checkpoint of a revision, judged as the revision itself judges; `draws` says which resamples, for all sides.

    Raises:
        ConfigError: the parameters of the revision are none of this version.
        DataError: its files cannot be had.
    """
    params = repository.params(revision)
    paths = ProfilePaths(params.profile)
    results = list(read_results(repository.fetch(revision, predictions_path(paths, checkpoint))))
    categories = read_categories(repository.fetch(revision, categories_path(paths)))
    judged = params.eval.model_copy(update={"bootstrap_resamples": draws.eval.bootstrap_resamples})
    return evaluate(results, categories, judged, params.matching, draws.seed)


def tokens_trained(repository: Repository, revision: str, profile: str, stage: str) -> int:
    """What a training stage trained on; raises DataError if its record cannot be had."""
    path = repository.fetch(revision, (ProfilePaths(profile).run(stage) / RUN_METADATA).as_posix())
    tokens = TRAINED.read_object(path).get("tokens")
    if type(tokens) is not int:
        TRAINED.refuse(str(path), f"tokens is {shown(tokens)}")
    return tokens


def effect_row(arm: str, baseline: str, ours: Side, theirs: Side, level: float = LEVEL) -> dict[str, Any]:
    """The effects of an arm beside its baseline, with verdicts.

    Only the primary metric decides, at `level`. Nothing is decided, and `faults` says why, if answers of a side are
    cut, loop or do not parse, or if neither side beats blind answers. Raises DataError if the sides cannot be paired.
    """
    unsound = faults({**ours, **theirs}) or _blind({**ours, **theirs})
    row: dict[str, Any] = {"arm": arm, "baseline": baseline, "faults": unsound, "metrics": {}}
    for key in METRICS:
        found = side_effect(ours, theirs, key, level if key == PRIMARY else LEVEL)
        verdict = Verdict.UNDEFINED if found is None else found.verdict
        verdict = Verdict.NOT_JUDGED if found and row["faults"] else verdict
        row["metrics"][key] = (asdict(found) if found else {}) | {"verdict": verdict.value}
    return row


def side_effect(ours: Side, theirs: Side, key: str, level: float = LEVEL) -> Effect | None:
    """The effect ours - theirs on one metric; None where a side does not have it."""
    if not all(has(evaluation, key) for evaluation in (*ours.values(), *theirs.values())):
        return None
    return paired_effect([*ours.values()], [*theirs.values()], key, level)


def has(evaluation: Evaluation, key: str) -> bool:
    """Whether a metric was evaluated: `eval` may ask for other thresholds of duplicates."""
    area, metric = key.split(".")
    return metric in evaluation.metrics[area]


def _blind(sides: Side) -> dict[str, list[str]]:
    """Why no run of any side beats blind answers, in words; empty if one does."""
    found = {name: learned_nothing(e.value(MARGIN), e.metrics["interval"].get(MARGIN)) for name, e in sides.items()}
    return {name: [why] for name, why in found.items()} if found and all(found.values()) else {}


def faults(side: Side) -> dict[str, list[str]]:
    """What is wrong with the answers of each run of a side, in words; runs whose answers are sound are left out."""
    return {name: words for name, found in side.items() if (words := faults_of(found.metrics))}
