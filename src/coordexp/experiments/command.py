"""`coordexp ab`, an A/B test or a whole study in one command, and `coordexp monitor`, which follows a training run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from coordexp.errors import ConfigError, closest


def ab(
    assignments: Annotated[
        list[str] | None,
        typer.Option("-S", "--set-param", metavar="KEY=V[,V...]", help="Values to try; all combinations."),
    ] = None,
    study: Annotated[str | None, typer.Option(help="A study of configs/studies/, in place of -S.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Of the study, only these arms and their baselines.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=50, help="Repetitions of every arm  [default: 3]")] = None,
    name: Annotated[str | None, typer.Option(help="Of report and experiments  [default: from -S or --study]")] = None,
) -> None:
    """Is one setting better than another, or is it noise?

    Runs every arm as DVC experiments, one at a time, and writes reports/ab/<name>.md: paired differences over images
    and seeds, verdicts on arms and claims, costs and curves. Interrupted, run it again: what is done is not done again.
    """
    from coordexp.config.study import load_study
    from coordexp.experiments.compare import run_study
    from coordexp.experiments.plan import grid_study
    from coordexp.experiments.report import verdict_sentence
    from coordexp.experiments.runs import Repository

    if bool(assignments) == bool(study) or (arm and not study):
        raise ConfigError("ab: expected either -S KEY=V,V or --study NAME, and --arm only with --study.")
    words = study or "-".join(assignments or [])
    chosen = name or re.sub(r"[^A-Za-z0-9.]+", "-", words).strip("-.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", chosen):
        raise ConfigError(f"--name {chosen!r}: expected 1 to 60 letters, digits, dots, dashes or underscores.")
    asked = load_study(study).only(arm or []) if study else grid_study(assignments or [], f"A/B test {chosen}")
    asked = asked.model_copy(update={"seeds": seeds or asked.seeds})
    numbers = run_study(Repository(Path(), lambda line: print(line, file=sys.stderr, flush=True)), asked, chosen)
    for row in numbers["effects"]:
        print(verdict_sentence(row, numbers))
    for claim in numbers["claims"]:
        print(f"{claim['text']}: {claim['judgement']}")
    print(f"report: {Path('reports') / 'ab' / f'{chosen}.md'}")


def monitor(
    stage: Annotated[str, typer.Argument(help="stage1, stage1-control or stage2, while it runs.")],
    profile: Annotated[str | None, typer.Option(help="Name in configs/  [default: `profile` of params.yaml]")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, max=500, help="Images of dev  [default: those of training, `monitor.images`]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write  [default: runs/monitor/<profile>/<stage>]")] = None,
    once: Annotated[bool, typer.Option("--once", help="Evaluate the present state and stop.")] = False,
    poll: Annotated[float, typer.Option(min=0.1, help="Seconds between two checks for a new state.")] = 5.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Evaluate every state that a training run saves, on the dev images that it is evaluated on itself, with mAP.

    A process of its own at low priority; training does not know of it. Ends when the run ends.
    """
    import os

    from coordexp.config.run import RunConfig
    from coordexp.experiments.events import Events
    from coordexp.experiments.monitor import STAGES, find_state, follow, open_monitor

    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r}: expected {', '.join(STAGES)}.{closest(stage, STAGES)}")
    run = RunConfig.read(Path("params.yaml"), profile)
    folder = out or Path("runs") / "monitor" / run.params.profile / stage
    state = find_state(Path(), stage)
    os.nice(10)
    events = Events(folder / "tensorboard") if tensorboard else None
    callback = open_monitor(run, stage, images, folder, device)
    for row in follow(callback, state, poll, lambda: events.follow(state) if events else None):
        if events:
            events.follow(folder, "monitor")
        shown = (f"{key} {'undefined' if value is None else f'{value:.4g}'}" for key, value in row.items())
        print("  ".join(shown), flush=True)
        if once:
            break
    if events:
        events.follow(run.paths.run(stage))  # what was added after the last glance, if the run has ended
    print(f"curve: {callback.curve}")
