"""A study from arms to verdicts: run what is missing, evaluate every run on the same images, judge arms and claims.

    plan_study -> Plan -> run_arm -> Run -> judge -> Numbers -> report

`run_study` writes `reports/ab/<name>.json` (every number), `<name>.md` (made from it) and `<name>.png`, anew after each
seed that is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from coordexp.config.loading import load_params
from coordexp.config.paths import ProfilePaths
from coordexp.config.study import METRICS, PRIMARY, TRAINED, Claim, Study
from coordexp.errors import DataError
from coordexp.evaluation.comparison import paired_effect
from coordexp.evaluation.effect import LEVEL, Effect, Verdict
from coordexp.evaluation.evaluator import Evaluation, evaluate, rounded
from coordexp.evaluation.parse import faults_of
from coordexp.evaluation.registry import view
from coordexp.experiments.dependencies import Present
from coordexp.experiments.plan import Plan, plan_study
from coordexp.experiments.report import PANELS, write_report
from coordexp.experiments.runs import Repository
from coordexp.infra.files import remove, replace_folder, write_text
from coordexp.infra.logs import ends, read_log
from coordexp.infra.provenance import write_json
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import read_results

METADATA, LOG = "run_metadata.json", "train_log.jsonl"


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One arm with one seed: how its checkpoints answer, how its training went, what it cost."""

    experiment: str
    evaluations: Mapping[str, Evaluation]  # by checkpoint
    log: pd.DataFrame  # of the checkpoint of the arm
    seconds: float
    tokens: int


Runs = Mapping[str, Sequence[Run]]  # by arm, one run a seed


def run_study(repository: Repository, study: Study, name: str) -> dict[str, Any]:
    """Run what is missing, seed by seed, and return all numbers, as they are written to `reports/ab/<name>.json`.

    Raises:
        ConfigError: the study is wrong, the workspace is not committed, or repetitions would all be alike.
        Interrupted: stopped; the same call goes on.
        TrainingError: a stage of an experiment failed.
    """
    root = repository.root
    plan = plan_study(study, root)
    about = {"name": name, "title": study.title, "commit": repository.commit(), "profile": plan.profile}
    # Before anything is trained: what would stop the comparison afterwards.
    reads = {arm: tuple(_wanted(plan, arm).values()) for arm in study.arms}
    presents = {read: repository.present(plan.profile, read) for read in set(reads.values())}
    for folder in (root / "runs" / "ab" / name, root / "reports" / "ab"):
        _make_folder(folder)
    runs: dict[str, list[Run]] = {arm: [] for arm in study.arms}
    numbers: dict[str, Any] = {}
    for seed in range(study.seeds):
        for arm in study.arms:
            runs[arm].append(run_arm(repository, plan, arm, seed, name, presents[reads[arm]]))
        numbers = about | {"seed_keys": list(plan.seed_keys)} | judge(study, runs)
        write_json(root / "reports" / "ab" / f"{name}.json", numbers)
        logs = {arm: [run.log for run in found] for arm, found in runs.items()}
        write_report(numbers, logs, root / "reports" / "ab")
    return numbers


def run_arm(repository: Repository, plan: Plan, arm: str, seed: int, name: str, present: Present) -> Run:
    """One arm with one seed, run and fetched if it is not there yet, and evaluated."""
    slug, wanted = plan.slug(arm, seed), _wanted(plan, arm)
    experiment = repository.experiment(f"ab-{name}-{slug}", slug, plan.overrides(arm, seed), present)
    folder = repository.root / "runs" / "ab" / name / slug
    if not _is_fetched(folder, experiment.revision, wanted):
        _fetch(repository, experiment.revision, wanted, folder)
    params = load_params(folder / "params.yaml")
    categories = read_categories(folder / "categories.json")
    checkpoint = plan.study.arms[arm].checkpoint
    costs = [json.loads((folder / s / METADATA).read_text(encoding="utf-8")) for s in plan.trained(checkpoint)]
    return Run(
        experiment=experiment.name,
        evaluations={
            of: evaluate(
                list(read_results(folder / "eval" / of / "gt_vs_pred.jsonl")),
                categories,
                params.eval,
                params.matching,
                params.seed,
            )
            for of in _checkpoints(plan.study, arm)
        },
        log=read_log(folder / checkpoint / LOG),
        seconds=sum(cost["wall_seconds"] for cost in costs),
        tokens=sum(cost["tokens"] for cost in costs),
    )


def judge(study: Study, runs: Runs) -> dict[str, Any]:
    """The effect of every arm beside its baseline, and what it says of every claim.

    Only the primary metric decides about an arm, at a level that holds for all arms together. Nothing is decided, and
    `faults` says why, if answers of a side are cut, loop or do not parse.
    """
    compared = [name for name, arm in study.arms.items() if arm.baseline]
    level = LEVEL / max(1, len(compared))
    effects = []
    for name in compared:
        baseline = study.arms[name].baseline
        ours, theirs = _side(study, runs, name, ""), _side(study, runs, name, baseline)
        row: dict[str, Any] = {"arm": name, "baseline": baseline, "faults": _faults(ours | theirs), "metrics": {}}
        for key in METRICS:
            found = _effect(ours, theirs, key, level if key == PRIMARY else LEVEL)
            verdict = Verdict.UNDEFINED if found is None else found.verdict
            verdict = Verdict.NOT_JUDGED if found and row["faults"] else verdict
            row["metrics"][key] = (asdict(found) if found else {}) | {"verdict": verdict.value}
        effects.append(row)
    first = next(iter(_side(study, runs, next(iter(study.arms)), "").values()))
    return rounded(
        {
            "seeds": len(next(iter(runs.values()))),
            "n_images": first.table.n_images,
            "level": level,
            "arms": {name: arm.model_dump() for name, arm in study.arms.items()},
            "runs": [_row(study, name, seed, run) for name, found in runs.items() for seed, run in enumerate(found)],
            "effects": effects,
            "claims": [_judged_claim(study, runs, name, claim) for name, claim in study.claims.items()],
        }
    )


def judged(claim: Claim, found: Effect | None, faults: Mapping[str, Any]) -> str:
    """What a 95 % interval says of a claim: confirmed, refuted, or not shown; `same` is within the margin."""
    if found is None or faults:
        return (Verdict.UNDEFINED if found is None else Verdict.NOT_JUDGED).value
    if claim.expected == "same":
        inside = -claim.margin < found.lo and found.hi < claim.margin
        outside = found.lo > claim.margin or found.hi < -claim.margin
        return "confirmed" if inside else "refuted" if outside else "not shown"
    lo, hi = (found.lo, found.hi) if claim.expected == "higher" else (-found.hi, -found.lo)
    return "confirmed" if lo > 0 else "refuted" if hi < 0 else "not shown"


def _judged_claim(study: Study, runs: Runs, name: str, claim: Claim) -> dict[str, Any]:
    ours, theirs = _side(study, runs, claim.arm, ""), _side(study, runs, claim.arm, claim.baseline)
    found = _effect(ours, theirs, claim.metric, LEVEL)
    row = {"claim": name, **claim.model_dump(), **(asdict(found) if found else {})}
    return row | {"judgement": judged(claim, found, _faults(ours | theirs))}


Side = Mapping[str, Evaluation]  # by "experiment checkpoint", one a seed, in their order


def _side(study: Study, runs: Runs, arm: str, baseline: str) -> dict[str, Evaluation]:
    """The evaluations of an arm, or of its baseline, seed by seed."""
    name = arm if baseline in (*TRAINED, "") else baseline
    checkpoint = baseline if baseline in TRAINED else study.arms[name].checkpoint
    return {f"{seed} {run.experiment} {checkpoint}": run.evaluations[checkpoint] for seed, run in enumerate(runs[name])}


def _effect(ours: Side, theirs: Side, key: str, level: float) -> Effect | None:
    if not all(_has(evaluation, key) for evaluation in (*ours.values(), *theirs.values())):
        return None
    return paired_effect([*ours.values()], [*theirs.values()], key, level)


def _has(evaluation: Evaluation, key: str) -> bool:
    """Whether a metric was evaluated: `eval` may ask for other thresholds of duplicates."""
    area, metric = key.split(".")
    return metric in evaluation.metrics[area]


def _faults(side: Side) -> dict[str, list[str]]:
    return {name.partition(" ")[2]: words for name, found in side.items() if (words := faults_of(found.metrics))}


def _row(study: Study, arm: str, seed: int, run: Run) -> dict[str, Any]:
    """The values of one run as a row of a frame: metrics, the end of its training, and what the training cost."""
    checkpoint = study.arms[arm].checkpoint
    evaluation = run.evaluations[checkpoint]
    keys = dict.fromkeys((*METRICS, *view("headline", evaluation.params)))
    tenths = {column: ends(run.log, column) for column in PANELS}
    row = {"arm": arm, "seed": seed, "experiment": run.experiment, "seconds": run.seconds, "tokens": run.tokens}
    row |= {key: evaluation.value(key) for key in keys if _has(evaluation, key)}
    return row | {column: None if found is None else found[1] for column, found in tenths.items()}


def _checkpoints(study: Study, arm: str) -> list[str]:
    """The checkpoints of an arm's runs that the study evaluates."""
    baselines = [study.arms[arm].baseline, *(claim.baseline for claim in study.claims.values() if claim.arm == arm)]
    return [name for name in TRAINED if name in (study.arms[arm].checkpoint, *baselines)]


def _wanted(plan: Plan, arm: str) -> dict[str, str]:
    """What the comparison reads of a run: name in its folder -> output of the graph. Nothing else is read later."""
    paths, checkpoint = ProfilePaths(plan.profile), plan.study.arms[arm].checkpoint
    wanted = {f"eval/{name}": paths.evaluation(name) for name in _checkpoints(plan.study, arm)}
    wanted |= {"categories.json": paths.records / "categories.json", f"{checkpoint}/{LOG}": paths.run(checkpoint) / LOG}
    wanted |= {f"{stage}/{METADATA}": paths.run(stage) / METADATA for stage in plan.trained(checkpoint)}
    return {name: path.as_posix() for name, path in wanted.items()}


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder}: a file is in the way. Expected a folder; move the file.") from error


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
