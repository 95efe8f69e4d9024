"""A study from arms to verdicts: run what is missing, evaluate every run on the same images, judge arms and claims.

    plan_study -> Plan -> run_arm -> Run -> judge -> Numbers -> report

`run_study` writes `reports/ab/<name>.json` (every number), `<name>.md` (made from it) and `<name>.png`, anew after each
seed that is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from coordexp.config.paths import RUN_METADATA, TRAIN_LOG, ProfilePaths
from coordexp.config.study import METRICS, TRAINED, Claim, Study
from coordexp.evaluation.effect import LEVEL, Effect, Verdict
from coordexp.evaluation.evaluator import Evaluation, rounded
from coordexp.evaluation.registry import view
from coordexp.experiments.dependencies import Present
from coordexp.experiments.plan import Plan, plan_study
from coordexp.experiments.progress import total
from coordexp.experiments.report import PANELS, write_report
from coordexp.experiments.runs import Experiment, Repository
from coordexp.experiments.sides import (
    categories_path,
    effect_row,
    evaluate_revision,
    faults,
    has,
    predictions_path,
    side_effect,
    tokens_trained,
)
from coordexp.infra.logs import ends, read_log
from coordexp.infra.provenance import write_json


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One arm with one seed: how its checkpoints answer, how its training went, what it cost."""

    experiment: str
    evaluations: Mapping[str, Evaluation]  # by checkpoint
    log: pd.DataFrame  # of the checkpoint of the arm
    seconds: float | None  # of the training, where it was measured
    tokens: int


Runs = Mapping[str, Sequence[Run]]  # by arm, one run a seed


@dataclass(frozen=True, slots=True)
class Prepared:
    """A study that can run: all that could stop it was checked."""

    plan: Plan
    start: Experiment  # the commit
    presents: Mapping[str, Present]  # by arm

    def first(self, repository: Repository, arm: str, seed: int) -> list[Experiment]:
        """The experiments of the same arm and seed in other tests, which are tried first."""
        slug = self.plan.slug(arm, seed)
        return repository.experiments(f"ab-*-{slug}", f"ab-*-{slug}-[0-9]*")


def prepare(repository: Repository, study: Study) -> Prepared:
    """Check a study; raises ConfigError: it is wrong, or the workspace is not committed, or no stage makes a file."""
    plan = plan_study(study, repository.root)
    start = repository.commit()
    reads = {arm: _read(plan, arm) for arm in study.arms}
    presents = {read: repository.present(plan.profile, read) for read in set(reads.values())}
    return Prepared(plan, start, {arm: presents[read] for arm, read in reads.items()})


def forecast(repository: Repository, prepared: Prepared) -> list[str]:
    """The runs of a study, which of them are there, and what the others would cost by stages measured before."""
    plan, study = prepared.plan, prepared.plan.study
    head, measured = repository.past(prepared.start.revision), repository.estimates(plan.profile)
    ran: set[str] = set()  # a stage with the same inputs is run once
    lines: list[str] = []
    costs: list[float | None] = []
    for seed in range(study.seeds):
        for arm in study.arms:
            overrides, present = plan.overrides(arm, seed), prepared.presents[arm]
            found, _ = repository.find(overrides, present, prepared.first(repository, arm, seed))
            steps: list[str] = []
            for step in present.steps(head, overrides) if not found else []:
                key = f"{step.stage} {present.told_stage(step.stage, overrides) if step.reason else overrides}"
                if step.stage in present.plans and key not in ran:
                    ran.add(key)
                    steps.append(step.stage)
            costs += [measured.get(stage) for stage in steps]
            shown = f"there already, as {found.name}" if found else ", ".join(steps) or "from the cache"
            lines.append(f"{arm}, seed {seed}: {shown}")
    return [*lines, f"{len(lines)} runs; at most {total(costs)} of work, by the last measured time of each stage"]


def run_study(repository: Repository, study: Study, name: str) -> dict[str, Any]:
    """Run what is missing, seed by seed, and return all numbers, as they are written to `reports/ab/<name>.json`.

    Raises:
        ConfigError: the study is wrong, the workspace is not committed, or repetitions would all be alike.
        Interrupted: stopped; the same call goes on.
        CoordExpError: a stage of an experiment failed.
    """
    prepared = prepare(repository, study)
    for line in forecast(repository, prepared):
        repository.say(line)
    about = {"name": name, "title": study.title, "commit": prepared.start.revision, "profile": prepared.plan.profile}
    runs: dict[str, list[Run]] = {arm: [] for arm in study.arms}
    numbers: dict[str, Any] = {}
    folder = repository.root / "reports" / "ab"
    for seed in range(study.seeds):
        for arm in study.arms:
            done = sum(map(len, runs.values()))
            repository.say(f"run {done + 1} of {study.seeds * len(study.arms)}: {arm}, seed {seed}")
            runs[arm].append(run_arm(repository, prepared, arm, seed, name))
        numbers = about | {"seed_keys": list(prepared.plan.seed_keys)} | judge(study, runs)
        write_json(folder / f"{name}.json", numbers)
        logs = {arm: [run.log for run in found] for arm, found in runs.items()}
        write_report(numbers, logs, folder)
    return numbers


def run_arm(repository: Repository, prepared: Prepared, arm: str, seed: int, name: str) -> Run:
    """One arm with one seed, run and fetched if it is not there yet, and evaluated."""
    plan, present = prepared.plan, prepared.presents[arm]
    experiment = repository.experiment(
        f"ab-{name}-{plan.slug(arm, seed)}",
        plan.overrides(arm, seed),
        present,
        prepared.first(repository, arm, seed),
        present.targets,
    )
    revision, checkpoint = experiment.revision, plan.study.arms[arm].checkpoint
    stages, measured = plan.trained(checkpoint), repository.seconds(experiment.revision)
    draws = repository.params(prepared.start.revision)
    return Run(
        experiment=experiment.name,
        evaluations={of: evaluate_revision(repository, revision, of, draws) for of in _checkpoints(plan.study, arm)},
        log=read_log(repository.fetch(revision, _log(plan, arm))),
        seconds=sum(measured[stage] for stage in stages) if {*stages} <= measured.keys() else None,
        tokens=sum(tokens_trained(repository, revision, plan.profile, stage) for stage in stages),
    )


def judge(study: Study, runs: Runs) -> dict[str, Any]:
    """The effect of every arm beside its baseline, at a level that holds for all arms, and what it says of claims."""
    compared = [name for name, arm in study.arms.items() if arm.baseline]
    level = LEVEL / max(1, len(compared))
    baselines = {name: study.arms[name].baseline for name in compared}
    effects = [
        effect_row(name, baseline, _side(study, runs, name, ""), _side(study, runs, name, baseline), level)
        for name, baseline in baselines.items()
    ]
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
    found = side_effect(ours, theirs, claim.metric)
    row = {"claim": name, **claim.model_dump(), **(asdict(found) if found else {})}
    return row | {"judgement": judged(claim, found, faults(ours | theirs))}


def _side(study: Study, runs: Runs, arm: str, baseline: str) -> dict[str, Evaluation]:
    """The evaluations of an arm, or of its baseline, seed by seed."""
    name = arm if baseline in (*TRAINED, "") else baseline
    checkpoint = baseline if baseline in TRAINED else study.arms[name].checkpoint
    return {f"{run.experiment} {checkpoint}": run.evaluations[checkpoint] for run in runs[name]}


def _row(study: Study, arm: str, seed: int, run: Run) -> dict[str, Any]:
    """The values of one run as a row of a frame: metrics, the end of its training, and what the training cost."""
    checkpoint = study.arms[arm].checkpoint
    evaluation = run.evaluations[checkpoint]
    keys = dict.fromkeys((*METRICS, *view("headline", evaluation.params)))
    tenths = {column: ends(run.log, column) for column in PANELS}
    row = {"arm": arm, "seed": seed, "experiment": run.experiment, "seconds": run.seconds, "tokens": run.tokens}
    row |= {key: evaluation.value(key) for key in keys if has(evaluation, key)}
    return row | {column: None if found is None else found[1] for column, found in tenths.items()}


def _checkpoints(study: Study, arm: str) -> list[str]:
    """The checkpoints of an arm's runs that the study evaluates."""
    baselines = [study.arms[arm].baseline, *(claim.baseline for claim in study.claims.values() if claim.arm == arm)]
    return [name for name in TRAINED if name in (study.arms[arm].checkpoint, *baselines)]


def _log(plan: Plan, arm: str) -> str:
    return (ProfilePaths(plan.profile).run(plan.study.arms[arm].checkpoint) / TRAIN_LOG).as_posix()


def _read(plan: Plan, arm: str) -> tuple[str, ...]:
    """The outputs of the graph that the comparison reads of a run. Nothing else is read later."""
    paths, checkpoint = ProfilePaths(plan.profile), plan.study.arms[arm].checkpoint
    predictions = [predictions_path(paths, name) for name in _checkpoints(plan.study, arm)]
    metadata = [(paths.run(stage) / RUN_METADATA).as_posix() for stage in plan.trained(checkpoint)]
    return (*predictions, categories_path(paths), _log(plan, arm), *metadata)
