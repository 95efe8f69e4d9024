"""Results of a check: one JSON line each, appended at once, and the table of a file of them."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

PACKAGES = ("torch", "triton", "transformers", "peft")
RESULTS, TABLE = "results.jsonl", "results.md"
HEAD = ("section", "what", "measured", "predicted", "measured / predicted", "unit", "note")
Status = Literal["measured", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One figure, or why there is none. `at_most` is where a fault begins; a prediction is only compared with."""

    section: str
    name: str
    status: Status
    value: float | None = None
    unit: str = ""
    prediction: float | None = None
    basis: str = ""  # of the prediction: derived, or guess
    at_most: float | None = None
    note: str = ""
    card: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether something is broken: it failed, or is beyond what is right."""
        beyond = self.value is not None and self.at_most is not None and not self.value <= self.at_most
        return self.status == "failed" or beyond


@dataclass(frozen=True, slots=True)
class Setting:
    """What figures depend on: the card, the versions, the day."""

    card: str
    versions: dict[str, str]
    date: str

    @classmethod
    def here(cls, device: torch.device) -> Setting:
        """Of this process."""
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
        versions = {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))}
        if torch.version.cuda:
            versions["cuda"] = torch.version.cuda
        return cls(card, versions, datetime.now(UTC).date().isoformat())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def append(folder: Path, result: Result) -> None:
    """Add a line; a run that is cut off keeps what it found."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RESULTS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(result)) + "\n")


def read(folder: Path) -> list[Result]:
    """The lines of a folder; of what was measured more than once on a card the last, in the order of the first."""
    path = folder / RESULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [Result(**json.loads(line)) for line in lines]
    return list({(result.card, result.section, result.name): result for result in found}.values())


def markdown(results: Sequence[Result]) -> str:
    """A table for each card, with the settings that its figures come from above it."""
    parts: list[str] = []
    for card in dict.fromkeys(result.card for result in results):
        of_card = [result for result in results if result.card == card]
        settings = {f"{r.date}: {', '.join(f'{n} {v}' for n, v in r.versions.items())}" for r in of_card}
        rows = [HEAD, ("---",) * len(HEAD), *(_cells(result) for result in of_card)]
        parts += [f"# {card}", "", *sorted(settings), "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(parts)


def _cells(result: Result) -> list[str]:
    measured = "-" if result.value is None else number(result.value)
    if result.is_fault and result.value is not None:
        measured += f" > {number(result.at_most or 0.0)}: FAULT"
    expected = ratio = ""
    if result.prediction is not None:
        expected = f"{number(result.prediction)} ({result.basis})"
        ratio = "" if result.value is None or not result.prediction else f"{result.value / result.prediction:.2f}"
    said = result.note if result.status == "measured" else f"{result.status.upper()}: {result.note}"
    return [result.section, result.name, measured, expected, ratio, result.unit, said.replace("|", "/")]


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
