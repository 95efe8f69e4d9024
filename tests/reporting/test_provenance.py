"""What an experiment changed against the commit it started from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from coordexp.config.paths import ProfilePaths
from coordexp.reporting.inputs import Baseline, ReportInputs
from coordexp.reporting.provenance import experiment_baseline, experiment_line, run_records, settings_delta


def test_only_differing_leaves_are_listed_by_their_dotted_keys() -> None:
    now = {"a": 1, "stage2": {"b": 0.5, "c": [1, 2]}, "new": True}
    then = {"a": 1, "stage2": {"b": 0.25, "c": (1, 2)}, "old": "x"}
    assert settings_delta(now, then) == [("stage2.b", 0.25, 0.5), ("new", None, True), ("old", "x", None)]


def test_the_line_names_the_change_and_the_command_that_compares() -> None:
    baseline = Baseline("0123456789abcdef", "", {"w": 1.0, "profile": "smoke"})
    line = experiment_line(baseline, {"w": 0.2, "profile": "tiny"})
    assert line.startswith("**Experiment on 0123456**: `w` 1 -> 0.2. ")
    assert "`coordexp compare 0123456 EXPERIMENT`" in line
    assert "no parameter differs" in experiment_line(baseline, {"w": 1.0})


def test_run_records_are_read_in_the_order_of_the_runs(inputs: ReportInputs, tmp_path: Path) -> None:
    records = run_records(inputs.run.paths)
    assert [record["stage"] for record in records] == ["stage1", "stage1-control", "stage2"]
    assert run_records(ProfilePaths("none", tmp_path)) == []


def test_the_baseline_is_read_from_the_commit_that_dvc_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@localhost")
    for name, text in {"params.yaml": "w: 1e-3\n", "configs/p.yaml": "steps: 4\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "params.yaml").write_text("w: 0.2\n")
    (tmp_path / "configs" / "p.yaml").write_text("steps: 8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_EXP_BASELINE_REV", raising=False)
    assert experiment_baseline("p") is None
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "HEAD")
    monkeypatch.setenv("DVC_EXP_NAME", "red-fox")
    found = experiment_baseline("p")
    assert found is not None
    assert (found.settings, found.experiment) == ({"w": 0.001, "configs/p.yaml": {"steps": 4}}, "red-fox")
    assert "`configs/p.yaml.steps` 4 -> 8" in experiment_line(found, {"w": 0.001})
