"""`coordexp ab`: an A/B test in one command."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from coordexp.errors import ConfigError


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
