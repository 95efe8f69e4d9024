"""One synthetic run and its report, made once for all workers: reading them is cheap, drawing is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordexp.reporting.inputs import ReportInputs
from coordexp.reporting.report import PAGE, build_report
from once import made_once, run_folder
from reporting.synthetic import build_run, everything_said, synthetic_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ReportInputs:
    """A run of 24 images; tests read it and never change it."""
    folder = made_once(run_folder(tmp_path_factory) / "judged", lambda folder: build_run(folder / "run", images=24))
    return synthetic_inputs(folder / "run")


@pytest.fixture(scope="session")
def report(inputs: ReportInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of its progress.md, with the pictures, the details and all that DVC keeps beside it."""
    folder = made_once(run_folder(tmp_path_factory) / "report", lambda folder: build_report(inputs, folder / "report"))
    return folder / "report" / PAGE


@pytest.fixture(scope="session")
def text(report: Path) -> str:
    """Page one and the details."""
    return everything_said(report)


@pytest.fixture(scope="session")
def metrics(inputs: ReportInputs) -> dict[str, Any]:
    """What metrics.json holds."""
    return json.loads(inputs.metrics.read_text(encoding="utf-8"))
