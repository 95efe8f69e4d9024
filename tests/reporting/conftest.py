"""One synthetic run and its report, made once: reading them is cheap, drawing is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordexp.reporting.inputs import ReportInputs
from coordexp.reporting.report import build_report
from reporting.synthetic import build_run, everything_said


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ReportInputs:
    """A run of 24 images; tests read it and never change it."""
    return build_run(tmp_path_factory.mktemp("run"), images=24)


@pytest.fixture(scope="session")
def report(inputs: ReportInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of its progress.md, with the pictures, the details and all that DVC keeps beside it."""
    return build_report(inputs, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def text(report: Path) -> str:
    """Page one and the details."""
    return everything_said(report)


@pytest.fixture(scope="session")
def metrics(inputs: ReportInputs) -> dict[str, Any]:
    """What metrics.json holds."""
    return json.loads(inputs.metrics.read_text(encoding="utf-8"))
