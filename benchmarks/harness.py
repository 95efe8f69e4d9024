"""What every benchmark shares: a row of the table, and the file with the machine it was measured on."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; `value` is None where it could not be measured, and `beside` says why."""

    name: str
    value: float | None
    unit: str
    beside: str
    target: str
    met: bool | None


def save(name: str, rows: list[Row]) -> None:
    """Write benchmarks/results/<name>.json, and print the rows."""
    cells = [asdict(row) for row in rows]
    machine = {"cores": len(os.sched_getaffinity(0)), "cpu": platform.machine(), "python": platform.python_version()}
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps({"machine": machine, "rows": cells}, indent=1)
    (RESULTS / f"{name}.json").write_text(f"{content}\n", encoding="utf-8")
    print(tabulate(cells, headers="keys"))
