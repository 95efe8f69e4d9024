"""What is decided before DVC is asked: a committed workspace, and experiments that are there already."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from coordexp.errors import ConfigError, TrainingError
from coordexp.experiments.runs import Repository


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """One commit, an empty home."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@localhost")
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return Repository(tmp_path, lambda _line: None)


def test_uncommitted_changes_are_refused_and_untracked_files_are_not(repo: Repository) -> None:
    (repo.root / "notes.txt").write_text("untracked")
    assert len(repo.commit()) == 40
    (repo.root / "params.yaml").write_text("seed: 2\n")
    with pytest.raises(ConfigError, match=r"params\.yaml.*commit first"):
        repo.commit()


def test_no_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no git commit"):
        Repository(tmp_path, lambda _line: None).commit()


def test_an_experiment_of_this_commit_is_not_run_again(repo: Repository) -> None:
    head = repo.commit()
    subprocess.run(["git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/ab-x", head], cwd=repo.root, check=True)
    assert repo.experiment("ab-x", ["seed=2"]) == head


def test_a_run_that_fails_shows_the_end_of_its_output(repo: Repository) -> None:
    with pytest.raises(TrainingError, match=r"ab-y: dvc exp run ended with \d+ and left no experiment:\n(?s:.)*DVC"):
        repo.experiment("ab-y", ["seed=2"])  # the folder is no DVC repository
