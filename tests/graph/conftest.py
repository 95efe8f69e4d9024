"""A clone in which the smoke profile ran and its model answers, made once for all workers; tests get copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from once import made_once, run_folder
from smoke_clone import Clone, new_clone
from workspaces import ANSWERING


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, repository: Path, warm: Path) -> Clone:
    """The clone after its first `dvc repro` with committed results; tests must not change it."""

    def make(folder: Path) -> None:
        (folder / "home").mkdir()
        clone = new_clone(repository, folder / "clone", folder / "home", ANSWERING, warm)
        (folder / "output").write_text(clone.succeed("dvc", "repro"), encoding="utf-8")
        clone.commit("smoke results")

    folder = made_once(run_folder(tmp_path_factory) / "smoke", make)
    return Clone(folder / "clone", folder / "home", warm)


@pytest.fixture(scope="session")
def reproduced(finished: Clone) -> str:
    """The output of the first `dvc repro`."""
    return (finished.root.parent / "output").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def experimented(finished: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone after `dvc exp run` with another weight of stage 2; tests must not change it."""

    def make(folder: Path) -> None:
        clone = finished.copy(folder)
        output = clone.succeed("dvc", "exp", "run", "--set-param", "softce_weight=0.2")
        (folder / "output").write_text(output, encoding="utf-8")

    folder = made_once(run_folder(tmp_path_factory) / "experimented", make)
    return Clone(folder / "clone", folder / "home", finished.warm)


@pytest.fixture
def clone(finished: Clone, tmp_path: Path) -> Clone:
    """A clone in which the graph has run."""
    return finished.copy(tmp_path)


@pytest.fixture(scope="session")
def published(finished: Clone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clone that has pushed, `clone`, the DVC remote `store` and the git remote `bare.git`."""

    def make(folder: Path) -> None:
        clone = finished.copy(folder)
        clone.succeed("dvc", "remote", "add", "--default", "store", str(folder / "store"))
        clone.commit("remote")
        clone.succeed("dvc", "push")
        clone.succeed("git", "init", "--quiet", "--bare", "--initial-branch", "main", str(folder / "bare.git"))
        clone.succeed("git", "remote", "add", "origin", str(folder / "bare.git"))
        clone.succeed("git", "push", "--quiet", "origin", "main")

    return made_once(run_folder(tmp_path_factory) / "published", make)


@pytest.fixture
def other(published: Path, finished: Clone, tmp_path: Path) -> Clone:
    """A clone on another machine: git from a bare repository, data from a DVC remote, no cache of its own."""
    (tmp_path / "home").mkdir()
    other = Clone(tmp_path / "clone", tmp_path / "home", finished.warm)
    finished.succeed("git", "clone", "--quiet", str(published / "bare.git"), str(other.root))
    return other
