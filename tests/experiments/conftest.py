"""Worlds and workspaces of the training tests, and a finished toy graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import workspace, world
from once import made_once, run_folder
from toy_graph import enter_environment, new_toy

__all__ = ["workspace", "world"]


@pytest.fixture(scope="session")
def committed_toy(tmp_path_factory: pytest.TempPathFactory, repository: Path, warm: Path) -> Path:
    """A folder with a toy repository whose results are committed; not to be changed."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            enter_environment(patch, repository, folder, warm)
            toy = new_toy(repository, folder)
            toy.succeed("dvc", "repro", "--quiet")
            toy.commit("results")

    return made_once(run_folder(tmp_path_factory) / "toy", make)
