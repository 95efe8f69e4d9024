"""The sides of a comparison, each with one or several evaluated runs, and the effect between them.

A side maps "experiment checkpoint" to its evaluation, one per seed, in the same order as the other side. Answers,
categories and training cost come from the run's own revision, never from the workspace. Answers are stored as decoded,
so any readout and any evaluation parameters are applied here, without running the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coordexp.config.paths import RUN_METADATA, ProfilePaths
from coordexp.config.question import METRICS, PRIMARY
from coordexp.config.schema import DecodeParams, Params
from coordexp.errors import DataError
from coordexp.evaluation.blind import MARGIN, learned_nothing
from coordexp.evaluation.comparison import paired_effect
from coordexp.evaluation.effect import LEVEL, Effect, Verdict
from coordexp.evaluation.evaluator import Evaluation, evaluate
from coordexp.evaluation.measures import MEASURES
from coordexp.evaluation.parse import faults_of
from coordexp.experiments.runs import KEPT, WORKSPACE, Repository
from coordexp.infra.artefacts import let_go
from coordexp.infra.code_hash import code_hash
from coordexp.infra.files import remove
from coordexp.infra.foreign import Gate, shown
from coordexp.infra.provenance import fingerprint
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult, read_results, write_results
from coordexp.rollout import scoring
from coordexp.rollout.engine import READOUT_KEYS
from coordexp.rollout.scoring import DISTRIBUTIONS, read_decoded, read_summary, scored
from coordexp.training.stage1 import COMPUTE

TRAINED = Gate("a JSON object with `tokens`", DataError, "Train the stage again.")
Side = Mapping[str, Evaluation]


def answers_path(paths: ProfilePaths, checkpoint: str) -> str:
    """The answers of a checkpoint on val, with their distributions, an output of the graph."""
    return paths.decoded(checkpoint).as_posix()


def categories_path(paths: ProfilePaths) -> str:
    """The categories of the data set, an output of the graph."""
    return (paths.records / "categories.json").as_posix()


def compute_path(paths: ProfilePaths) -> str:
    """The cost of stage 2, an output of the graph."""
    return paths.run("stage2-compute.json").as_posix()


def read_answers(
    repository: Repository, revision: str, paths: ProfilePaths, checkpoint: str, decode: DecodeParams
) -> list[ImageResult]:
    """The answers of a checkpoint on val under a readout. The result is stored, and the distributions are deleted.

    Raises:
        DataError: the answers are not available.
    """
    path = answers_path(paths, checkpoint)
    folder = repository.fetch(revision, path)
    if revision == WORKSPACE:
        return [scored(answer, decode) for answer in read_decoded(folder)]
    readout = {"decode": decode.model_dump(include=READOUT_KEYS), "code": code_hash(scoring.__name__)}
    kept = repository.root / KEPT / revision / "scored" / f"{checkpoint}-{fingerprint(readout, [])}.jsonl"
    if not kept.is_file():
        was_read = read_summary(folder)["codec"] != "digits" and not (folder / DISTRIBUTIONS).is_file()
        if was_read:  # under another readout, after which the distributions were deleted
            remove(folder)
            folder = repository.fetch(revision, path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_results(kept, (scored(answer, decode) for answer in read_decoded(folder)))
        let_go(folder / DISTRIBUTIONS)  # over many runs they take gigabytes
    return list(read_results(kept))


def evaluate_revision(
    repository: Repository, revision: str, checkpoint: str, params: Params, draws: Params
) -> Evaluation:
    """Evaluate a checkpoint of a revision on val by `params`; `draws` has the resampling parameters of all sides.

    Raises:
        DataError: its files are not available.
    """
    paths = ProfilePaths(params.profile)
    results = read_answers(repository, revision, paths, checkpoint, params.decode)
    categories = read_categories(repository.fetch(revision, categories_path(paths)))
    # Pairing needs the same resamples on all sides, so seed and number are common to them.
    common = params.eval.model_copy(update={"bootstrap_resamples": draws.eval.bootstrap_resamples})
    return evaluate(results, categories, common, params.matching, draws.seed)


def tokens_trained(repository: Repository, revision: str, profile: str, stage: str) -> int:
    """The training tokens of a stage; raises DataError if its record is not available."""
    path = repository.fetch(revision, (ProfilePaths(profile).run(stage) / RUN_METADATA).as_posix())
    return _number(TRAINED, path, TRAINED.read_object(path).get("tokens"), "tokens")


def rollout_tokens(repository: Repository, revision: str, profile: str) -> int:
    """The tokens that rollouts of stage 2 read and generated; raises DataError as `tokens_trained`."""
    path = repository.fetch(revision, compute_path(ProfilePaths(profile)))
    return _number(COMPUTE, path, COMPUTE.read_sealed(path).get("rollout_tokens"), "rollout_tokens")


def _number(gate: Gate, path: Path, value: Any, name: str) -> int:
    if type(value) is not int:
        gate.refuse(str(path), f"{name} is {shown(value)}")
    return value


def effect_row(arm: str, baseline: str, ours: Side, theirs: Side, level: float = LEVEL) -> dict[str, Any]:
    """The effects of an arm relative to its baseline, with verdicts.

    Only the primary metric is decisive, at `level`. There is no verdict, and `faults` has the reasons, if answers of a
    side are truncated, loop or do not parse, or if no side beats the blind controls. Raises DataError if the sides
    cannot be paired.
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
    """Whether a metric was evaluated: `eval` may set other duplicate thresholds."""
    area, metric = key.split(".")
    return key in MEASURES or metric in evaluation.metrics.get(area, {})


def _blind(sides: Side) -> dict[str, list[str]]:
    """Why no run of any side beats the blind controls, in words; empty if one does."""
    found = {name: learned_nothing(e.value(MARGIN), e.metrics["interval"].get(MARGIN)) for name, e in sides.items()}
    return {name: [why] for name, why in found.items()} if found and all(found.values()) else {}


def faults(side: Side) -> dict[str, list[str]]:
    """The faults of the answers of each run of a side, in words; runs without faults are omitted."""
    return {name: words for name, found in side.items() if (words := faults_of(found.metrics))}
