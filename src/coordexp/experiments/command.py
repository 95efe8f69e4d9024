"""`coordexp ab`, an A/B test in one command, and `coordexp monitor`, a look at a training run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from coordexp.errors import ConfigError, closest


def ab(
    assignments: Annotated[
        list[str], typer.Option("-S", "--set-param", metavar="KEY=V[,V...]", help="Values to try; all combinations.")
    ],
    seeds: Annotated[int, typer.Option(min=1, max=50, help="Repetitions of every arm.")] = 3,
    name: Annotated[str | None, typer.Option(help="Of the report and the experiments  [default: from -S]")] = None,
) -> None:
    """Is one setting better than another, or is it noise?

    Runs every combination as DVC experiments, one at a time, and writes reports/ab/<name>.md: paired differences over
    images and seeds, a verdict, costs and curves. Interrupted, run it again: what is done is not done again.
    """
    from coordexp.experiments.compare import run_ab
    from coordexp.experiments.report import verdict_sentence, write_ab_report
    from coordexp.experiments.runs import Repository

    chosen = name or re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(assignments)).strip("-.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", chosen):
        raise ConfigError(f"--name {chosen!r}: expected 1 to 60 letters, digits, dots, dashes or underscores.")
    root = Path()
    numbers = run_ab(
        Repository(root, lambda line: print(line, file=sys.stderr, flush=True)), assignments, seeds, chosen
    )
    for row in numbers["effects"]:
        print(verdict_sentence(row, numbers))
    print(f"report: {write_ab_report(numbers, root / 'runs' / 'ab' / chosen, root / 'reports' / 'ab')}")


def monitor(
    stage: Annotated[str, typer.Argument(help="stage1, stage1-control or stage2, while it runs.")],
    profile: Annotated[str | None, typer.Option(help="Name in configs/  [default: `profile` of params.yaml]")] = None,
    images: Annotated[int, typer.Option(min=1, max=500, help="Images of dev, the same ones at every look.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Folder to write  [default: runs/monitor/<profile>/<stage>]")] = None,
    once: Annotated[bool, typer.Option("--once", help="Look at the present state and stop.")] = False,
    poll: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks for a new state.")] = 5.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Watch a training run: decode, count and keep the same dev images with every state that it saves.

    A process of its own at low priority; training does not know of it. Ends when the run ends.
    """
    import os

    from coordexp.config.loading import load_params, load_profile
    from coordexp.config.paths import ProfilePaths
    from coordexp.config.run import RunConfig
    from coordexp.experiments.events import Events
    from coordexp.experiments.monitor import STAGES, Monitor, find_state, watch

    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r}: expected {', '.join(STAGES)}.{closest(stage, STAGES)}")
    params = load_params(Path("params.yaml"))
    params = params.model_copy(update={"profile": profile or params.profile})
    paths = ProfilePaths(params.profile)
    folder = out or Path("runs") / "monitor" / params.profile / stage
    state = find_state(Path(), stage)
    os.nice(10)
    events = Events(folder / "tensorboard") if tensorboard else None
    settings = load_profile(Path("configs") / f"{params.profile}.yaml")
    watcher = Monitor(RunConfig(params=params, profile=settings, paths=paths), stage, images, device)
    for look in watch(watcher, state, folder, poll, events.follow if events else lambda _run: None):
        if events:
            events.look(look.step, look.values)
        shown = "  ".join(
            f"{key} {'undefined' if value is None else f'{value:.4g}'}" for key, value in look.values.items()
        )
        print(f"step {look.step}: {shown}", flush=True)
        if once:
            break
    if events:
        events.follow(paths.run(stage))  # what was added after the last glance, if the run has ended
    print(f"curve: {folder / 'curve.tsv'}")
