"""The documents show what was measured on a GPU beside what is predicted, and nothing of a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordexp.reporting.gpu_tables import PREDICTED, RESULTS, Measured, hours_table, measured, one_device_table


def result(name: str, value: float, **changes: object) -> str:
    row = {"section": "step-2b", "name": name, "status": "measured", "value": value, "card": "H100"}
    return json.dumps(row | {"date": "2027-01-02"} | changes)


def write(root: Path, *lines: str) -> dict[tuple[str, str], Measured]:
    (root / RESULTS).parent.mkdir(parents=True)
    (root / RESULTS).write_text("\n".join(lines))
    return measured(root)


def test_only_the_last_measurements_count(tmp_path: Path) -> None:
    found = write(
        tmp_path,
        result("8k, as committed: peak", 40.0),
        result("8k, as committed: peak", 44.4),
        result("8k, as committed: step", 9.0, card="CPU (x86_64)"),
        result("all", 0.0, status="skipped"),
    )
    assert found == {("step-2b", "8k, as committed: peak"): Measured(44.4, "H100, 2027-01-02")}
    first, *others = one_device_table(found).splitlines()[2:]
    assert first.startswith("| 2B | all, AdamW |")
    assert "44 GB (H100, 2027-01-02)" in first
    assert all(PREDICTED in row for row in others)


def test_without_measurements_all_values_are_predicted(tmp_path: Path, repository: Path) -> None:
    assert measured(tmp_path) == {}
    assert all(row.endswith(f"| {PREDICTED} |") for row in hours_table(repository, {}).splitlines()[2:])


def test_hours_of_training_grow_with_the_measured_step(repository: Path) -> None:
    def hours(seconds: float) -> float:
        found = {("step-2b", "8k, as committed: step"): Measured(seconds, "H100, 2027-01-02")}
        row = hours_table(repository, found).splitlines()[2]
        assert "training: H100" in row
        return float(row.split("|")[2])

    assert hours(100.0) / hours(10.0) == pytest.approx(10.0, rel=0.01)
