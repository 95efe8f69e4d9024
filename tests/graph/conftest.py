"""One clone in which the smoke profile ran undisturbed, for all tests of this folder; its model answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from smoke_clone import Clone, new_clone
from workspaces import ANSWERING


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Clone:
    """The clone before its first run."""
    return new_clone(repository, tmp_path_factory.mktemp("smoke"), tmp_path_factory.mktemp("home"), ANSWERING)


@pytest.fixture(scope="session")
def reproduced(clone: Clone) -> str:
    """The output of the first `dvc repro`; its results are committed."""
    output = clone.succeed("dvc", "repro")
    clone.commit("smoke results")
    return output
