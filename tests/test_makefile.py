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
def test_an_unknown_name_stops_before_anything_is_built(
    tmp_path: Path, repository: Path, arguments: list[str], words: str
) -> None:
    shutil.copy(repository / "Makefile", tmp_path)
    shutil.copytree(repository / "configs", tmp_path / "configs")
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(["make", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_the_vllm_build_is_selected_by_name_and_has_a_lock_file(tmp_path: Path, repository: Path, build: str) -> None:
    lock = {"cpu": "requirements-vllm.lock", "cuda": "requirements-vllm-cuda.lock"}[build]
    for file in ("Makefile", "requirements-torch.lock", lock):
        shutil.copy(repository / file, tmp_path)
    asked = ["make", "-n", "vllm", f"VLLM_BUILD={build}"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"-r {lock}\n" in done.stdout
    assert ("--no-deps --require-hashes" in done.stdout) == (build == "cpu")
    assert f"holds the {build} build of vLLM ({lock})" in done.stdout
