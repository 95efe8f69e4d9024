"""An A/B test from parameters to verdict: run the grid, evaluate every run on the same images, compare with the first.

`run_ab` writes `reports/ab/<name>.json` (every number), `<name>.md` (made from it) and `<name>.png`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.config.loading import load_params
from coordexp.config.paths import ProfilePaths
from coordexp.errors import ConfigError, DataError
from coordexp.evaluation.effect import LEVEL, Verdict, effect
from coordexp.evaluation.evaluator import Evaluation, evaluate
from coordexp.evaluation.headline import headline_keys
from coordexp.evaluation.soundness import faults_of
from coordexp.evaluation.suite import eval_settings
from coordexp.experiments.dependencies import Present
from coordexp.experiments.grid import Arm, Grid, plan_grid
from coordexp.experiments.protocol import PRIMARY, SECONDARY
from coordexp.experiments.runs import Repository
from coordexp.infra.files import remove, replace_folder, write_text
from coordexp.infra.provenance import write_json
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import read_results

JUDGED = "stage2"  # the checkpoint that the graph is there to make
METADATA = "run_metadata.json"
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """One arm with one seed: how it answers, what it cost, how its losses went."""

    experiment: str
    evaluation: Evaluation
    metadata: dict[str, dict[str, Any]]  # stage that the test trains -> run_metadata.json
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
    grid = plan_grid(assignments, root)
    if not grid.trained and seeds > 1:
        raise ConfigError(f"--seeds {seeds}: no stage trains again for {', '.join(assignments)}; use --seeds 1.")
    commit = repository.commit()
    wanted = _wanted(params.profile, grid)
    present = repository.present(params.profile, list(wanted.values()))
    for folder in (root / "runs" / "ab" / name, root / "reports" / "ab"):
        _make_folder(folder)
    runs = {
        arm: [_one_run(repository, grid, arm, seed, name, wanted, present) for seed in range(seeds)]
        for arm in grid.arms
    }
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


def _wanted(profile: str, grid: Grid) -> dict[str, str]:
    """What the comparison reads of a run: name in its folder -> output of the graph. Nothing else is read later."""
    paths = ProfilePaths(profile)
    wanted = {"eval": paths.evaluation(JUDGED), "categories.json": paths.records / "categories.json"}
    wanted["stage2/train_log.jsonl"] = paths.run("stage2") / "train_log.jsonl"
    wanted |= {f"{stage}/{METADATA}": paths.run(stage) / METADATA for stage in grid.trained_stages}
    return {name: path.as_posix() for name, path in wanted.items()}


def _make_folder(folder: Path) -> None:
    """Before anything is trained: a file in the way would stop the comparison afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder}: a file is in the way. Expected a folder; move the file.") from error


def _one_run(
    repository: Repository, grid: Grid, arm: Arm, seed: int, name: str, wanted: Mapping[str, str], present: Present
) -> Run:
    run = f"{arm.slug}-s{seed}"
    experiment = repository.experiment(f"ab-{name}-{run}", run, grid.overrides(arm, seed), present)
    folder = repository.root / "runs" / "ab" / name / run
    if not _is_fetched(folder, experiment.revision, wanted):
        _fetch(repository, experiment.revision, wanted, folder)
    settings = eval_settings(load_params(folder / "params.yaml"))
    categories = read_categories(folder / "categories.json")
    results = list(read_results(folder / "eval" / "gt_vs_pred.jsonl"))
    metadata = {
        stage: json.loads((folder / stage / METADATA).read_text(encoding="utf-8")) for stage in grid.trained_stages
    }
    return Run(experiment.name, evaluate(results, categories, settings), metadata, folder)


def _fetch(repository: Repository, revision: str, wanted: Mapping[str, str], folder: Path) -> None:
    """Put the files of a run into its folder, all or none; whatever was there is replaced."""
    new = folder.with_name(f".{folder.name}.part")
    remove(new)
    for target, path in wanted.items():
        repository.fetch(revision, path, new / target)
    write_text(new / "params.yaml", repository.text(revision, "params.yaml"))
    write_text(new / "revision", revision)
    replace_folder(new, folder)


def _is_fetched(folder: Path, revision: str, wanted: Mapping[str, str]) -> bool:
    mark = folder / "revision"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != revision:
        return False
    return all((folder / name).exists() for name in (*wanted, "params.yaml"))


def _arm_row(arm: Arm, runs: Sequence[Run], grid: Grid) -> dict[str, Any]:
    """Values by seed, and the cost of what the arm trained: seconds and tokens of one seed, as measured when it ran."""
    shown = dict.fromkeys((PRIMARY, *SECONDARY, *headline_keys(runs[0].evaluation.settings)))
    trained = grid.trained_stages
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
