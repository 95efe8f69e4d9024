"""`coordexp run`, `runs`, `compare` of revisions, `ab`, `answer`, and `monitor`: experiments over the stage graph."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from coordexp.errors import BusyError, ConfigError, CoordExpError, Interrupted, closest
from coordexp.infra.printable import note

if TYPE_CHECKING:
    from coordexp.config.question import Question
    from coordexp.config.run import RunConfig
    from coordexp.experiments.answer import Answer
    from coordexp.experiments.dependencies import Present, Step
    from coordexp.experiments.runs import Experiment, Repository

Checkpoint = Annotated[
    Literal["base", "stage1", "stage1-control", "stage2"],
    typer.Option(help="The checkpoint whose predictions on val are compared."),
]


def run(
    assignments: Annotated[
        list[str] | None, typer.Option("-S", "--set-param", metavar="KEY=VALUE", help="A value to change; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of experiment and report  [default: from -S]")] = None,
    checkpoint: Checkpoint = "stage2",
    dry: Annotated[bool, typer.Option("--dry", help="Print what would run and its estimated cost, and stop.")] = False,
) -> None:
    """Run one experiment and compare it with the commit: did the change improve the detector?

    Runs the graph with these values in a temporary copy, so the workspace does not change. Compares with the commit on
    the same images and writes reports/experiments/<name>.md. Without -S, runs the committed parameters. If interrupted,
    run it again to resume.
    """
    overrides = assignments or []
    for assignment in overrides:
        if not re.fullmatch(r"[^=]+=.+", assignment, re.DOTALL):
            raise ConfigError(f"-S {assignment}: expected KEY=VALUE, such as softce_weight=0.2.")
    keys = [assignment.partition("=")[0] for assignment in overrides]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"-S {repeated[0]}: given twice; use `coordexp ab` to compare several values of one key.")
    with _experiments() as repository:
        _run(repository, overrides, name, checkpoint, dry)


def _run(repository: Repository, overrides: Sequence[str], name: str | None, checkpoint: str, dry: bool) -> None:
    from coordexp.config.paths import GT_VS_PRED, ProfilePaths
    from coordexp.experiments.answer import answer
    from coordexp.experiments.dependencies import ParameterFiles
    from coordexp.experiments.sides import answers_path, categories_path

    start = repository.commit()
    chosen = _chosen(name, [a.rpartition(":")[2] for a in overrides] or [f"as-committed-{start.revision[:7]}"])
    profile = ParameterFiles.of(repository.root).profile_name
    paths = ProfilePaths(profile)
    evaluated = (paths.evaluation(checkpoint) / GT_VS_PRED).as_posix()  # every complete experiment has this file
    present = repository.present(profile, (answers_path(paths, checkpoint), evaluated, categories_path(paths)))
    present.told(overrides)  # rejects invalid values before anything runs
    baseline, _ = repository.find([], present, [start])
    found, _ = repository.find(overrides, present, [start]) if overrides else (baseline, "")
    if name and not found and repository.is_taken(name):
        raise ConfigError(
            f"--name {name}: another experiment has this name. Choose another name, or `dvc exp remove {name}` first."
        )
    print("\n".join(_plan(repository, present, start, overrides, (baseline, found))))
    if dry:
        return
    base_name = f"as-committed-{start.revision[:7]}"
    baseline = baseline or repository.experiment(base_name if overrides else chosen, [], present)
    made = found or (repository.experiment(chosen, overrides, present) if overrides else baseline)
    if made.revision == baseline.revision:
        print(
            f"{made.name} ({made.revision[:12]}) already has these values, so there is nothing to compare; "
            "`dvc metrics show` prints its metrics"
        )
        return
    _tell(repository, answer(repository, made, baseline, checkpoint), None)


def _plan(
    repository: Repository,
    present: Present,
    start: Experiment,
    overrides: Sequence[str],
    ready: tuple[Experiment | None, Experiment | None],
) -> list[str]:
    """The lines of the plan: baseline, experiment, and the stages that will run."""
    head, (baseline, found) = repository.past(start.revision), ready
    values = " ".join(overrides) or "the parameters as committed"
    lines = []
    if baseline:
        lines.append(f"baseline    {baseline.name} ({baseline.revision[:12]})")
    elif overrides:
        lines += [f"baseline    the results of {start.name} are not available: it runs first"]
        lines += _steps(repository, present, present.steps(head, []))
    lines.append(f"experiment  {values}" + (f": exists as {found.name}" if found else ""))
    after = None if overrides and not baseline else head
    return lines if found else lines + _steps(repository, present, present.steps(after, overrides))


def _steps(repository: Repository, present: Present, steps: Sequence[Step]) -> list[str]:
    from coordexp.experiments.progress import duration, total

    measured = repository.estimates(present.files.profile_name)
    lines = []
    for step in steps:
        why = f"if the output of {step.upstream} changes" if step.upstream else f"{step.reason} changed"
        cost = f"about {duration(measured[step.stage])}" if step.stage in measured else "cost unknown"
        lines.append(f"  {step.stage:<22} {why}; {cost}")
    limit = total([measured.get(step.stage) for step in steps])
    return [
        *lines,
        f"  at most {limit} by the last measured time of each stage; less if DVC's run cache has results",
    ]


def _tell(repository: Repository, found: Answer, out: Path | None) -> None:
    """Print an answer and write its page to `out`, or to the folder of experiment reports."""
    from coordexp.experiments.answer import answer_markdown, summary, write_answer
    from coordexp.infra.files import write_text

    print("\n".join(summary(found)))
    if out:
        write_text(out, answer_markdown(found))
        print(f"report: {out}")
    elif found["is_experiment"]:
        print(f"report: {write_answer(found, repository.root)}")
        print(f"keep it: dvc exp apply {found['name']}, then commit; discard it: dvc exp remove {found['name']}")


def runs(
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of experiments, newest first.")] = 20,
    every: Annotated[bool, typer.Option("--all", help="List all experiments.")] = False,
    checkpoint: Checkpoint = "stage2",
    state: Annotated[
        bool, typer.Option("--state", help="List instead the saved states of interrupted stages.")
    ] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="With --state: remove old states that are not in use.")
    ] = False,
    older_than: Annotated[float, typer.Option(min=0, metavar="DAYS", help="Minimum age for --clean.")] = 14.0,
) -> None:
    """List the experiments of all commits: changes, difference of mAP with its interval, verdict, cost, age.

    Each one is compared on val with the commit that it started from; the comparison is stored.
    """
    if clean and not state:
        raise ConfigError("--clean: expected only together with --state.")
    if state:
        _print_state(clean, older_than)
        return
    import shutil
    import time

    from coordexp.experiments.answer import experiment_row, experiments_table

    repository = _repository()
    found = repository.experiments("*")
    shown = found if every else found[:limit]
    rows = [experiment_row(repository, one, checkpoint, time.time()) for one in shown]
    print(
        experiments_table(rows, shutil.get_terminal_size().columns)
        if rows
        else "no experiment yet: coordexp run -S softce_weight=0.2"
    )
    if len(shown) < len(found):
        print(f"{len(found) - len(shown)} older experiments: --all lists them")


def _print_state(clean: bool, older_than_days: float) -> None:
    from tabulate import tabulate

    from coordexp.experiments.progress import duration
    from coordexp.infra import resume

    root = resume.resume_root()
    for gone in resume.clean(root, older_than_days) if clean else []:
        print(f"removed: {gone.folder.name}, {gone.n_bytes / 1e6:.1f} MB")
    found = resume.kept(root)
    rows = [[one.folder.name, f"{one.n_bytes / 1e6:.1f}", duration(one.age_s), one.state] for one in found]
    print(tabulate(rows, ["in .resume/", "MB", "age", "state"], tablefmt="simple") if rows else "no saved states")
    if resumable := sum(one.can_go_on and not one.is_held for one in found):
        print(f"{resumable} can be resumed: run the same command again.")


def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged files, and restore those that have a good copy.")
    ] = False,
) -> None:
    """Verify all stored files against their hashes; reads all of them.

    Covers DVC's cache, the outputs in the workspace, the saved states of interrupted stages, and the images of the data
    sets. The exit code is 2 if something is damaged and was not repaired.
    """
    from coordexp.errors import EXIT_USAGE
    from coordexp.experiments.verify import verify as look

    repository = _repository()
    found = look(repository.root, repository.run, repair, repository.say)
    print("\n".join([*found.looked_at, *map(str, found.faults)]))
    if not found.is_whole:
        raise typer.Exit(EXIT_USAGE)


def compare_revisions(a: str, b: str, checkpoint: str, out: Path | None) -> None:
    """Compare B with A by their predictions in DVC's cache; write the report of B if it is an experiment."""
    from tabulate import tabulate

    from coordexp.experiments.answer import answer
    from coordexp.experiments.report import measured
    from coordexp.reporting.markdown import number

    repository = _repository()
    old, new = repository.resolve(a), repository.resolve(b)
    if old.revision == new.revision:
        raise ConfigError(f"{a} and {b} are the same revision, {old.revision[:12]}. Expected two, the older first.")
    found = answer(repository, new, old, checkpoint)
    metrics = found["effect"]["metrics"].items()
    rows = [[key, *map(number, found["values"][key]), measured(effect)] for key, effect in metrics]
    headers = ["metric", new.name, old.name, "difference, 95% interval"]
    _tell(repository, found, out)
    print(tabulate(rows, headers, tablefmt="simple", disable_numparse=True))


def _repository() -> Repository:
    from coordexp.experiments.runs import Repository

    return Repository(Path(), note)


@contextmanager
def _experiments() -> Iterator[Repository]:
    """The repository, locked for this process; a signal raises Interrupted."""
    # A shell starts background jobs with SIGINT ignored, and children inherit that; dvc and stages stop by SIGINT.
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        repository = _repository()
        with repository.held():
            yield repository
    except KeyboardInterrupt:
        raise Interrupted("stopped by a signal; run the same command again: finished work is not repeated.") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _chosen(name: str | None, words: Sequence[str]) -> str:
    """The name of experiments and report, valid for git and the file system."""
    from coordexp.experiments.runs import NAME

    chosen = name or re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words)).strip("-._")[:50]
    if not NAME.fullmatch(chosen) or chosen.endswith((".", ".lock")) or ".." in chosen:
        raise ConfigError(f"--name {chosen!r}: expected 1 to 60 letters, digits, dots, dashes or underscores.")
    return chosen


def ab(
    assignments: Annotated[
        list[str] | None,
        typer.Option("-S", "--set-param", metavar="KEY=V[,V...]", help="Values to compare; all combinations run."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=50, help="Repetitions of every arm.")] = 3,
    name: Annotated[str | None, typer.Option(help="Name of report and experiments  [default: from -S]")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Print the runs and their estimated cost, and stop.")] = False,
) -> None:
    """Run an A/B test: is one setting better than another, or is the difference noise?

    Runs every arm as DVC experiments, one at a time, and writes reports/ab/<name>.md: paired differences over images
    and seeds, verdicts, costs and curves. If interrupted, run it again: finished work is not repeated. For the
    predefined questions, use `coordexp answer`.
    """
    from coordexp.experiments.compare import forecast, prepare, run_study
    from coordexp.experiments.plan import grid_study
    from coordexp.experiments.report import verdict_sentence, write_report
    from coordexp.infra.provenance import write_json

    if not assignments:
        raise ConfigError("ab: expected -S KEY=V,V. For the predefined questions, use `coordexp answer`.")
    chosen = _chosen(name, assignments)
    asked = grid_study(assignments, f"A/B test {chosen}").model_copy(update={"seeds": seeds})
    folder = Path("reports") / "ab"

    def told(numbers: Mapping[str, Any], runs: Any) -> None:
        write_json(folder / f"{chosen}.json", numbers)
        write_report(numbers, {arm: [run.log for run in found] for arm, found in runs.items()}, folder)

    with _experiments() as repository:
        if dry:
            print("\n".join(forecast(repository, prepare(repository, asked))))
            return
        numbers = run_study(repository, asked, chosen, told)
    for row in numbers["effects"]:
        print(verdict_sentence(row, numbers))
    print(f"report: {folder / f'{chosen}.md'}")


def answer(
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="ID ...", help="Questions in configs/questions/.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All questions of the profile.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Print the questions, their rules and answers, and stop.")
    ] = False,
    arm: Annotated[
        list[str] | None, typer.Option(help="Run only these arms of one question, and their baselines; repeatable.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=50, help="Repetitions of every arm  [default: from the question]")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Name in configs/  [default: from the question, or params.yaml]")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", "--dry", help="Print the runs and their estimated cost, and stop.")
    ] = False,
) -> None:
    """Answer the predefined questions, each with its arms and decision rules.

    Runs missing experiments with DVC, one at a time, and writes reports/answers/<id>.md after each seed. Runs of other
    questions are reused. If interrupted, run it again to resume. With --all, failed questions are listed at the end.
    """
    from coordexp.experiments.questions import choose_questions, question_lines

    if listed:
        print("\n".join(question_lines(Path(), profile or "")))
        return
    chosen = choose_questions(Path(), questions or [], every, arm or [], seeds, profile or "")
    with _experiments() as repository:
        if dry:
            _forecast(repository, chosen)
        else:
            _answer(repository, chosen)


def _forecast(repository: Repository, chosen: Mapping[str, Question]) -> None:
    from coordexp.experiments.compare import Forecast, prepare
    from coordexp.experiments.progress import total

    found = Forecast(repository)
    for name, question in chosen.items():
        n_lines, n_costs = len(found.lines), len(found.costs)
        found.add(prepare(repository, question))
        cost = f"at most {total(found.costs[n_costs:])} more"
        print("\n".join([f"{name}: {question.question} ({cost})", *(f"  {line}" for line in found.lines[n_lines:])]))
    print(found.summary())


def _answer(repository: Repository, chosen: Mapping[str, Question]) -> None:
    from coordexp.experiments.questions import answer_question

    failed: list[str] = []
    for name, question in chosen.items():
        try:
            page, sentence = answer_question(repository, question, name)
        except (Interrupted, BusyError):
            raise
        except CoordExpError as error:
            if len(chosen) == 1:
                raise
            repository.say(f"{name}: {error}")
            failed.append(name)
            continue
        print(f"{name}: {sentence}\n  {page}", flush=True)
    if failed:
        raise ConfigError(f"{len(failed)} of {len(chosen)} questions failed, see above: {', '.join(failed)}.")


def monitor(
    stage: Annotated[str, typer.Argument(help="The running stage: stage1, stage1-control or stage2.")],
    profile: Annotated[str | None, typer.Option(help="Name in configs/  [default: `profile` of params.yaml]")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, max=500, help="Number of dev images  [default: `monitor.images`]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder  [default: runs/monitor/<profile>/<stage>]")] = None,
    once: Annotated[bool, typer.Option("--once", help="Evaluate the present state and stop.")] = False,
    kept: Annotated[
        bool, typer.Option("--kept", help="Evaluate every kept checkpoint of a finished run on all of dev.")
    ] = False,
    poll: Annotated[float, typer.Option(min=0.1, help="Seconds between two checks for a new state.")] = 5.0,
    track: Annotated[
        list[str] | None, typer.Option(help="Also log to dvclive, tensorboard, trackio or wandb; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Evaluate every state that a training run saves, on the same dev images as its eval callback, with mAP.

    Runs as a separate process with low priority, without effect on training, and ends with the run. With --kept, for a
    run with `monitor.keep_every_steps`, writes the full evaluation by step and the worst images over all steps to
    reports/<profile>/trajectory/<stage>.md.
    """
    import os

    from coordexp.config.run import RunConfig
    from coordexp.experiments.monitor import STAGES, find_state, follow, open_monitor, start_folder
    from coordexp.training.live import give_evaluation, open_trackers
    from coordexp.training.session import start_hash

    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r}: expected {', '.join(STAGES)}.{closest(stage, STAGES)}")
    run = RunConfig.read(Path("params.yaml"), profile)
    folder = out or Path("runs") / "monitor" / run.params.profile / stage
    os.nice(10)
    if kept:
        _evaluate_kept(run, stage, folder)
        return
    state = find_state(Path(), stage)
    callback = open_monitor(run, stage, images, folder, device)
    start = start_hash(start_folder(run, stage))
    trackers = open_trackers(track or [], folder, f"{run.params.profile}/{stage}-monitor")
    for row in follow(callback, state, start, poll):
        give_evaluation(trackers, "monitor", row, folder)
        shown = (f"{key} {'undefined' if value is None else f'{value:.4g}'}" for key, value in row.items())
        print("  ".join(shown), flush=True)
        if once:
            break
    for tracker in trackers:
        tracker.close()
    print(f"curve: {callback.curve}")


def _evaluate_kept(run: RunConfig, stage: str, folder: Path) -> None:
    from coordexp.config.paths import TRAIN_LOG
    from coordexp.experiments.trajectory import evaluate_steps
    from coordexp.infra.logs import read_log
    from coordexp.reporting.trajectory import write_trajectory

    points = evaluate_steps(run, stage, folder / "kept", note)
    log = read_log(run.paths.run(stage) / TRAIN_LOG)
    evaluated = {point.step: (point.results, point.evaluation) for point in points}
    print(f"trajectory: {write_trajectory(run, stage, evaluated, log)}")
