"""A name that does not exist stops `make` before it builds an environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check-profile", "PROFILE=nope"], "configs/nope.yaml: no such file; there are: coco-qwen3vl-2b"),
        (["preset", "PRESET=nope"], "configs/presets/nope.yaml: no such file; there are: mixture"),
    ],
)
def test_an_unknown_name_costs_nothing(tmp_path: Path, repository: Path, arguments: list[str], words: str) -> None:
    shutil.copy(repository / "Makefile", tmp_path)
    shutil.copytree(repository / "configs", tmp_path / "configs")
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(["make", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert sorted(tmp_path.iterdir()) == before
