"""What an experiment changed against the commit it started from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from coordexp.reporting.provenance import Baseline, baseline_markdown, experiment_baseline, settings_delta


def test_only_differing_leaves_are_listed_by_their_dotted_keys() -> None:
    now = {"a": 1, "stage2": {"b": 0.5, "c": [1, 2]}, "new": True}
    then = {"a": 1, "stage2": {"b": 0.25, "c": (1, 2)}, "old": "x"}
    assert settings_delta(now, then) == [("stage2.b", 0.25, 0.5), ("new", None, True), ("old", "x", None)]


def test_the_delta_shows_parameters_and_headline_numbers_with_their_change() -> None:
    baseline = Baseline("0123456789abcdef", {"w": 1.0, "profile": "smoke"}, {"stage2": {"mAP": 0.25}})
    text = baseline_markdown(baseline, {"w": 0.2, "profile": "tiny"}, {"stage2": {"mAP": 0.3}})
    assert "| `w` | 1 | 0.2 |" in text
    assert "| `stage2.mAP` | 0.2500 | 0.3000 | +0.0500 |" in text
    assert "profile" not in text


def test_without_a_change_or_a_baseline_the_text_says_so() -> None:
    baseline = Baseline("0123456789abcdef", {"w": 1.0}, {"m": 1})
    text = baseline_markdown(baseline, {"w": 1.0}, {"m": 1})
    assert "No parameter differs." in text
    assert "No headline number differs." in text
    assert "a baseline itself" in baseline_markdown(None, {}, {})


def test_the_baseline_is_read_from_the_commit_that_dvc_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@localhost")
    for name, text in {"params.yaml": "w: 1e-3\n", "configs/p.yaml": "steps: 4\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "reports" / "p").mkdir(parents=True)
    (tmp_path / "reports" / "p" / "headline.json").write_text(json.dumps({"m": 0.5}))
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "params.yaml").write_text("w: 0.2\n")
    (tmp_path / "configs" / "p.yaml").write_text("steps: 8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_EXP_BASELINE_REV", raising=False)
    assert experiment_baseline("p") is None
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "HEAD")
    found = experiment_baseline("p")
    assert found is not None
    assert (found.settings, found.headline) == ({"w": 0.001, "configs/p.yaml": {"steps": 4}}, {"m": 0.5})
    assert "| `configs/p.yaml.steps` | 4 | 8 |" in baseline_markdown(found, {"w": 0.001}, {"m": 0.5})
