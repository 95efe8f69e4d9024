"""An A/B test from parameters to verdict: run the grid, evaluate every run on the same images, compare with the first.

`run_ab` writes `reports/ab/<name>.json` (every number), `<name>.md` (made from it) and `<name>.png`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.config.files import write_text
from coordexp.config.loading import load_params, read_yaml
from coordexp.config.paths import ProfilePaths
from coordexp.config.provenance import write_json
from coordexp.errors import ConfigError, DataError
from coordexp.evaluation.effect import LEVEL, Verdict, effect
from coordexp.evaluation.evaluator import Evaluation, evaluate
from coordexp.evaluation.headline import headline_keys
from coordexp.evaluation.soundness import faults_of
from coordexp.evaluation.suite import eval_settings
from coordexp.experiments.grid import Arm, Grid, plan_grid
from coordexp.experiments.protocol import PRIMARY, SECONDARY
from coordexp.experiments.runs import Repository
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import read_results

JUDGED = "stage2"  # the checkpoint that the graph is there to make
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """One arm with one seed: how it answers, what it cost, how its losses went."""

    experiment: str
    evaluation: Evaluation
    metadata: dict[str, dict[str, Any]]  # training stage -> run_metadata.json
    folder: Path


def run_ab(repository: Repository, assignments: Sequence[str], seeds: int, name: str) -> dict[str, Any]:
    """Run what is missing and return all numbers of the comparison, as they are written to `reports/ab/<name>.json`.

    Raises:
        ConfigError: an assignment is wrong, the workspace is not committed, or repetitions would all be alike.
        Interrupted: stopped; the same call goes on.
        TrainingError: a stage of an experiment failed.
    """
    root = repository.root
    params = load_params(root / "params.yaml")
    grid = plan_grid(assignments, read_yaml(root / "dvc.yaml")["stages"], root / "params.yaml")
    if not grid.trained and seeds > 1:
        raise ConfigError(f"--seeds {seeds}: no stage trains again for {', '.join(assignments)}; use --seeds 1.")
    commit = repository.commit()
    paths = ProfilePaths(params.profile, root)
    runs = {arm: [_one_run(repository, grid, arm, seed, name, paths) for seed in range(seeds)] for arm in grid.arms}
    numbers = {
        "name": name,
        "profile": params.profile,
        "commit": commit,
        "checkpoint": JUDGED,
        "seeds": seeds,
        "seed_keys": list(grid.seed_keys),
        "n_images": runs[grid.arms[0]][0].evaluation.table.n_images,
        "level": LEVEL / (len(grid.arms) - 1),
        "arms": [_arm_row(arm, runs[arm], grid) for arm in grid.arms],
        "effects": [_effects(arm, runs[arm], runs[grid.arms[0]], len(grid.arms) - 1) for arm in grid.arms[1:]],
    }
    write_json(root / "reports" / "ab" / f"{name}.json", numbers)
    return numbers


def _one_run(repository: Repository, grid: Grid, arm: Arm, seed: int, name: str, paths: ProfilePaths) -> Run:
    experiment = f"ab-{name}-{arm.slug}-s{seed}"
    revision = repository.experiment(experiment, grid.overrides(arm, seed))
    folder = repository.root / "runs" / "ab" / name / f"{arm.slug}-s{seed}"
    if not _is_fetched(folder, revision):
        wanted = {"eval": f"runs/{paths.profile}/eval/{JUDGED}"}
        for stage in ("stage1", "stage2"):
            for file in ("run_metadata.json", "train_log.jsonl"):
                wanted[f"{stage}/{file}"] = f"runs/{paths.profile}/{stage}/{file}"
        for target, path in wanted.items():
            repository.fetch(revision, path, folder / target)
        repository.fetch(revision, "params.yaml", folder / "params.yaml")
        write_text(folder / "revision", revision)  # last: what is above is complete
    settings = eval_settings(load_params(folder / "params.yaml"))
    categories = read_categories(paths.records / "categories.json")
    results = list(read_results(folder / "eval" / "gt_vs_pred.jsonl"))
    metadata = {
        stage: json.loads((folder / stage / "run_metadata.json").read_text(encoding="utf-8"))
        for stage in ("stage1", "stage2")
    }
    return Run(experiment, evaluate(results, categories, settings), metadata, folder)


def _is_fetched(folder: Path, revision: str) -> bool:
    mark = folder / "revision"
    return mark.is_file() and mark.read_text(encoding="utf-8") == revision


def _arm_row(arm: Arm, runs: Sequence[Run], grid: Grid) -> dict[str, Any]:
    """Values by seed, and the cost of what the arm trained: seconds and tokens of one seed, as measured when it ran."""
    shown = dict.fromkeys((PRIMARY, *SECONDARY, *headline_keys(runs[0].evaluation.settings)))
    trained = ("stage1", "stage2") if grid.trained == "stage1" else ("stage2",) if grid.trained else ()
    return {
        "arm": arm.name,
        "experiments": [run.experiment for run in runs],
        "values": {key: [_rounded(run.evaluation.value(key)) for run in runs] for key in shown},
        "seconds": [round(sum(run.metadata[s]["wall_seconds"] for s in trained), 1) for run in runs],
        "tokens": [sum(run.metadata[s]["tokens"] for s in trained) for run in runs],
        "folders": [run.folder.name for run in runs],
    }


def _effects(arm: Arm, runs: Sequence[Run], reference: Sequence[Run], n_comparisons: int) -> dict[str, Any]:
    """The effect on every metric; only the primary one is corrected for the number of arms, only it decides.

    Nothing is decided, and `faults` says why, if answers of a run are cut, loop or do not parse.
    """
    _check_pairable(runs, reference)
    faults = {run.experiment: words for run in (*runs, *reference) if (words := faults_of(run.evaluation.metrics))}
    row: dict[str, Any] = {"arm": arm.name, "metrics": {}, "faults": faults}
    for key in (PRIMARY, *SECONDARY):
        level = LEVEL / n_comparisons if key == PRIMARY else LEVEL
        values = [(a.evaluation.value(key), b.evaluation.value(key)) for a, b in zip(runs, reference, strict=True)]
        if any(a is None or b is None for a, b in values):
            row["metrics"][key] = None
            continue
        deltas_S = np.array([a - b for a, b in values if a is not None and b is not None])
        resampled_SB = np.array(
            [a.evaluation.samples[key] - b.evaluation.samples[key] for a, b in zip(runs, reference, strict=True)]
        )
        found = effect(deltas_S, resampled_SB, level)
        rounded = None if found is None else {name: _rounded(value) for name, value in asdict(found).items()}
        if rounded is None or found is None:
            row["metrics"][key] = None
        else:
            verdict = Verdict.NOT_JUDGED if faults else found.verdict
            row["metrics"][key] = rounded | {"verdict": verdict.value}
    return row


def _check_pairable(runs: Sequence[Run], reference: Sequence[Run]) -> None:
    first = reference[0].evaluation.table
    for run in (*runs, *reference):
        table = run.evaluation.table
        same = np.array_equal(table.image_ids_I, first.image_ids_I)
        if not same or not np.array_equal(table.gt_boxes_G4, first.gt_boxes_G4):
            raise DataError(
                f"{run.experiment} was evaluated on other images or annotations than {reference[0].experiment}, so "
                "nothing can be paired. An A/B test cannot vary the data of the evaluation."
            )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
