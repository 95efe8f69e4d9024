"""From the arms of a question to verdicts: run missing experiments, evaluate all runs on the same images, compare.

    `plan_study` -> Plan -> `run_arm` -> Run -> `judge` -> Numbers -> pages

After each complete seed, `run_study` passes on all numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from coordexp.config.paths import RUN_METADATA, TRAIN_LOG, ProfilePaths
from coordexp.config.question import METRICS, TRAINED, Claim, Question, Trained
from coordexp.evaluation.comparison import Reading, reading, reading_effect
from coordexp.evaluation.effect import FEWEST_SEEDS, LEVEL, Effect, Verdict
from coordexp.evaluation.evaluator import Evaluation, rounded
from coordexp.evaluation.registry import view
from coordexp.experiments.dependencies import Present
from coordexp.experiments.plan import Plan, claim_metrics, plan_study
from coordexp.experiments.progress import total
from coordexp.experiments.readings import READINGS, RunFiles
from coordexp.experiments.report import PANELS
from coordexp.experiments.runs import Experiment, Repository
from coordexp.experiments.sides import (
    answers_path,
    categories_path,
    compute_path,
    effect_row,
    evaluate_revision,
    faults,
    has,
    rollout_tokens,
    side_effect,
    tokens_trained,
)
from coordexp.infra.logs import ends, read_log
from coordexp.training.stage1 import control_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One arm with one seed: evaluations of its checkpoints, training log, and cost."""

    experiment: str
    evaluations: Mapping[str, Evaluation]  # by checkpoint
    log: pd.DataFrame  # training log of the arm's checkpoint
    seconds: float | None  # training time, if it was measured
    tokens: int  # training tokens
    compute: int  # training tokens, plus those that rollouts read and generated, converted to training tokens
    control: int | None = None  # training tokens of the run's own control, if it is compared
    readings: Mapping[tuple[str, str], Reading | None] = field(default_factory=dict)  # by checkpoint and key


Runs = Mapping[str, Sequence[Run]]  # by arm, one run per seed
# Shown in addition to the metrics: faults of the answers, and training diagnostics of the coordinates.
CHECKED = ("rollout.f1", "parse.parse_rate", "parse.dropped_total", "parse.truncated_rate", "input.zero_area_boxes")
DIAGNOSTICS = (
    *("coord_diag/p_gt_mean", "coord_diag/acc_top5", "coord_diag/coord_vocab_mass_mean", "raw/gate"),
    "coord_diag/expected_bin_abs_err_p90",
)
Told = Callable[[Mapping[str, Any], Mapping[str, Sequence[Run]]], None]  # receives numbers and runs after each seed


@dataclass(frozen=True, slots=True)
class Prepared:
    """A validated question that is ready to run."""

    plan: Plan
    start: Experiment  # the commit
    presents: Mapping[str, Present]  # by arm

    def first(self, repository: Repository, arm: str, seed: int) -> list[Experiment]:
        """Candidates for reuse: experiments of the same arm and seed in other tests, and the commit itself."""
        slug = self.plan.slug(arm, seed)
        return [*repository.experiments(f"ab-*-{slug}", f"ab-*-{slug}-[0-9]*"), self.start]


def prepare(repository: Repository, study: Question) -> Prepared:
    """Validate a question.

    Raises:
        ConfigError: the question is invalid, the workspace is not committed, or no stage makes a needed file.
    """
    plan = plan_study(study, repository.root)
    start = repository.commit()
    reads = {arm: _read(plan, arm) for arm in study.arms}
    presents = {read: repository.present(plan.profile, read) for read in set(reads.values())}
    return Prepared(plan, start, {arm: presents[read] for arm, read in reads.items()})


@dataclass(slots=True)
class Forecast:
    """The runs that questions need: which exist, and the estimated cost of the others."""

    repository: Repository
    lines: list[str] = field(default_factory=list)
    costs: list[float | None] = field(default_factory=list)
    runs: int = 0
    _ran: set[str] = field(default_factory=set)  # stages with equal inputs and equal upstream stages run once

    def add(self, prepared: Prepared) -> None:
        """Add the runs of one more question."""
        plan, study = prepared.plan, prepared.plan.study
        head, measured = self.repository.past(prepared.start.revision), self.repository.estimates(plan.profile)
        for seed in range(study.seeds):
            for arm in study.arms:
                overrides, present = plan.overrides(arm, seed), prepared.presents[arm]
                found, _ = self.repository.find(overrides, present, prepared.first(self.repository, arm, seed))
                steps: list[str] = []
                for step in present.steps(head, overrides) if not found else []:
                    if step.stage in present.plans and (key := present.lineage(step.stage, overrides)) not in self._ran:
                        self._ran.add(key)
                        steps.append(step.stage)
                self.costs += [measured.get(stage) for stage in steps]
                self.runs += 1
                shown = f"exists as {found.name}" if found else ", ".join(steps) or "from the cache"
                self.lines.append(f"{arm}, seed {seed}: {shown}")

    def summary(self) -> str:
        """The number of runs and the estimated time."""
        return f"{self.runs} runs; at most {total(self.costs)}, by the last measured time of each stage"


def forecast(repository: Repository, prepared: Prepared) -> list[str]:
    """The runs of one question, and their estimated cost."""
    found = Forecast(repository)
    found.add(prepared)
    return [*found.lines, found.summary()]


def run_study(repository: Repository, study: Question, name: str, told: Told) -> dict[str, Any]:
    """Run missing experiments, seed by seed, and return all numbers; `told` receives them after each seed.

    Raises:
        ConfigError: the question is invalid, the workspace is not committed, or all repetitions would be identical.
        Interrupted: stopped; the same call resumes.
        CoordExpError: a stage of an experiment failed.
    """
    prepared = prepare(repository, study)
    for line in forecast(repository, prepared):
        repository.say(line)
    about = study.model_dump(include={"question", "source", "budget", "note"})
    about |= {"name": name, "commit": prepared.start.revision, "profile": prepared.plan.profile}
    runs: dict[str, list[Run]] = {arm: [] for arm in study.arms}
    numbers: dict[str, Any] = {}
    for seed in range(study.seeds):
        for arm in study.arms:
            done = sum(map(len, runs.values()))
            repository.say(f"run {done + 1} of {study.seeds * len(study.arms)}: {arm}, seed {seed}")
            runs[arm].append(run_arm(repository, prepared, arm, seed, name))
        numbers = about | {"seed_keys": list(prepared.plan.seed_keys)} | judge(study, runs)
        told(numbers, runs)
    return numbers


def run_arm(repository: Repository, prepared: Prepared, arm: str, seed: int, name: str) -> Run:
    """Run one arm with one seed, unless it exists; fetch its files and evaluate it."""
    plan, present = prepared.plan, prepared.presents[arm]
    experiment = repository.experiment(
        f"ab-{name}-{plan.slug(arm, seed)}",
        plan.overrides(arm, seed),
        present,
        prepared.first(repository, arm, seed),
        present.targets,
    )
    revision, checkpoint, params = experiment.revision, plan.study.arms[arm].checkpoint, plan.params[arm]
    stages, measured = plan.trained(checkpoint), repository.seconds(experiment.revision)
    draws = repository.params(prepared.start.revision)
    tokens = _tokens(repository, plan, revision, checkpoint)
    cost = {"tokens": tokens, "rollout_tokens": 0}
    if "stage2" in stages:
        cost["rollout_tokens"] = rollout_tokens(repository, revision, plan.profile)
    files = RunFiles(repository, revision, params, plan.profiles[arm], draws)
    compares_control = plan.compares_control(arm)
    return Run(
        experiment=experiment.name,
        evaluations={
            of: evaluate_revision(repository, revision, of, params, draws) for of in plan.study.checkpoints(arm)
        },
        log=read_log(repository.fetch(revision, _log(plan, arm))),
        seconds=sum(measured[stage] for stage in stages) if {*stages} <= measured.keys() else None,
        tokens=tokens,
        compute=control_tokens(cost, "compute"),
        control=_tokens(repository, plan, revision, "stage1-control") if compares_control else None,
        readings={(of, key): READINGS[key].read(files, of) for of, key in _run_keys(plan.study, arm)},
    )


def _tokens(repository: Repository, plan: Plan, revision: str, checkpoint: Trained) -> int:
    """The tokens of all training that a checkpoint comes from and that is repeated."""
    return sum(tokens_trained(repository, revision, plan.profile, stage) for stage in plan.trained(checkpoint))


def judge(study: Question, runs: Runs) -> dict[str, Any]:
    """The effect of every arm relative to its baseline, at a level that holds for all arms, and the claims."""
    # Bonferroni: with the level divided by the number of comparisons, all intervals hold together at 95 %.
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


def judged(claim: Claim, found: Effect | None, faults: Mapping[str, Any], enough: bool = True) -> str:
    """Whether a 95 % interval confirms a claim, refutes it, or shows neither; `same` means within the margin.

    The test of `same` is the interval form of an equivalence test (TOST, Schuirmann 1987): a difference that is not
    significant does not confirm it, only an interval inside the margin does. Otherwise a difference of 0 in every
    resample is "no effect". Without `enough` seeds nothing is shown. Faults of answers concern what is read from them.
    """
    if found is None:
        return Verdict.UNDEFINED.value
    if faults and (claim.metric not in READINGS or READINGS[claim.metric].of_answers):
        return Verdict.NOT_JUDGED.value
    if not enough:
        return "not shown"
    if claim.expected == "same":
        inside = -claim.margin < found.lo and found.hi < claim.margin
        outside = found.lo > claim.margin or found.hi < -claim.margin
        return "confirmed" if inside else "refuted" if outside else "not shown"
    if found.verdict is Verdict.IDENTICAL:
        return "no effect"
    lo, hi = (found.lo, found.hi) if claim.expected == "higher" else (-found.hi, -found.lo)
    return "confirmed" if lo > 0 else "refuted" if hi < 0 else "not shown"


def _judged_claim(study: Question, runs: Runs, name: str, claim: Claim) -> dict[str, Any]:
    ours = _side(study, runs, claim.arm, "")
    theirs = _side(study, runs, claim.arm, claim.baseline) if claim.baseline else {}
    values = [_readings(study, runs, claim.arm, baseline, claim.metric) for baseline in ("", claim.baseline)]
    found = reading_effect(values[0], values[1] if claim.baseline else claim.than)
    if claim.baseline and claim.metric not in READINGS:
        found = side_effect(ours, theirs, claim.metric)  # raises if the sides have different images
    row = {"claim": name, **claim.model_dump(), **_about(claim.metric), **(asdict(found) if found else {})}
    row["values"] = [_mean(side) for side in values[: 2 if claim.baseline else 1]]
    row["n_images"] = next((one.n_images for one in values[0] if one is not None), None)
    enough = study.budget == "decoding" or len(ours) >= FEWEST_SEEDS
    return row | {"judgement": judged(claim, found, faults(ours | theirs), enough)}


def _about(key: str) -> dict[str, str]:
    """The meaning and unit of a metric, measure or reading, and the images that it is of."""
    spec = claim_metrics()[key]
    return {"meaning": spec.meaning, "unit": spec.unit, "split": READINGS[key].split if key in READINGS else "val"}


def _mean(values: Sequence[Reading | None]) -> float | None:
    known = [one.value for one in values if one is not None]
    return sum(known) / len(known) if known else None


def _readings(study: Question, runs: Runs, arm: str, baseline: str, key: str) -> list[Reading | None]:
    """One number of an arm, or of its baseline, for each seed."""
    name, checkpoint = _named(study, arm, baseline)
    if key in READINGS:
        return [run.readings[checkpoint, key] for run in runs[name]]
    evaluations = [run.evaluations[checkpoint] for run in runs[name]]
    return [reading(evaluation, key) if has(evaluation, key) else None for evaluation in evaluations]


def _side(study: Question, runs: Runs, arm: str, baseline: str) -> dict[str, Evaluation]:
    """The evaluations of an arm, or of its baseline, for each seed."""
    name, checkpoint = _named(study, arm, baseline)
    side: dict[str, Evaluation] = {}
    for seed, run in enumerate(runs[name]):
        label = f"{run.experiment} {checkpoint}"  # several seeds have one run if nothing before the checkpoint varies
        side[f"{label}, seed {seed}" if label in side else label] = run.evaluations[checkpoint]
    return side


def _named(study: Question, arm: str, baseline: str) -> tuple[str, str]:
    """The arm and the checkpoint of one side of a comparison."""
    name = arm if baseline in (*TRAINED, "") else baseline
    return name, baseline if baseline in TRAINED else study.arms[name].checkpoint


def _run_keys(study: Question, arm: str) -> list[tuple[str, str]]:
    """The readings of an arm's runs, as checkpoint and key."""
    sides = [(c, side) for c in study.claims.values() if c.metric in READINGS for side in {"", c.baseline}]
    found = [(*_named(study, claim.arm, side), claim.metric) for claim, side in sides]
    return [*dict.fromkeys((checkpoint, key) for name, checkpoint, key in found if name == arm)]


def _row(study: Question, arm: str, seed: int, run: Run) -> dict[str, Any]:
    """The values of one run as a row: metrics, the end of its training log, and the cost of training."""
    checkpoint = study.arms[arm].checkpoint
    evaluation = run.evaluations[checkpoint]
    keys = dict.fromkeys((*METRICS, *view("headline", evaluation.params), *CHECKED))
    tenths = {column: ends(run.log, column) for column in (*PANELS, *DIAGNOSTICS)}
    row = {"arm": arm, "seed": seed, "experiment": run.experiment, "seconds": run.seconds, "tokens": run.tokens}
    row |= {"compute": run.compute} | ({"control": run.control} if run.control is not None else {})
    row |= {key: evaluation.value(key) for key in keys if has(evaluation, key)}
    return row | {column: None if found is None else found[1] for column, found in tenths.items()}


def _log(plan: Plan, arm: str) -> str:
    return (ProfilePaths(plan.profile).run(plan.study.arms[arm].checkpoint) / TRAIN_LOG).as_posix()


def _read(plan: Plan, arm: str) -> tuple[str, ...]:
    """The complete list of stage outputs that the comparison reads from a run."""
    paths, checkpoint = ProfilePaths(plan.profile), plan.study.arms[arm].checkpoint
    answers = [answers_path(paths, name) for name in plan.study.checkpoints(arm)]
    stages = plan.trained(checkpoint)
    counted = dict.fromkeys((*stages, *(plan.trained("stage1-control") if plan.compares_control(arm) else ())))
    taken = [(paths.run(stage) / RUN_METADATA).as_posix() for stage in counted]
    taken += [compute_path(paths)] if "stage2" in stages else []
    more = [path for of, key in _run_keys(plan.study, arm) for path in READINGS[key].paths(paths, of)]
    return (*answers, categories_path(paths), _log(plan, arm), *taken, *dict.fromkeys(more))
