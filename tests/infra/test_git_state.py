"""The commit in a run record: changed sources count as changes, files written by stages do not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from coordexp.infra.provenance import git_state


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("dvc.lock", "reports/tiny/progress.md", "src/code.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("committed")
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_written_by_stages_do_not_count_as_changes(repository: Path) -> None:
    (repository / "dvc.lock").write_text("rewritten")
    (repository / "reports" / "tiny" / "progress.md").write_text("rewritten")
    assert git_state()["dirty"] is False


def test_a_changed_source_counts_as_a_change(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "src" / "code.py").write_text("edited")
    assert git_state()["dirty"] is True
    monkeypatch.chdir(repository / "reports")  # wherever it is asked
    assert git_state()["dirty"] is True


def test_outside_a_checkout_the_state_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() == {"commit": None, "dirty": None}
