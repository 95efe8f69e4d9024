"""Threads of the tensor library: how many, and how long idle ones spin."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coordexp.infra.threads import (
    COUNT_NAME,
    CUDA_ALLOCATOR_NAMES,
    POLICY_NAME,
    SPIN_NAME,
    SPIN_ROUNDS,
    let_segments_grow,
    set_threads,
    usable_cores,
)

LOG = logging.getLogger("coordexp")


def environment_after(statement: str, repository: Path, **variables: str) -> str:
    """What GOMP_SPINCOUNT is when torch loads, after a statement in a fresh interpreter."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    script = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == 'torch': import os; print(os.environ.get('{SPIN_NAME}')); sys.exit()\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"{statement}\nimport torch\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        env=own | {"PYTHONPATH": f"{repository / 'src'}{os.pathsep}{repository}"} | variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize(
    "statement",
    ["import coordexp.cli", "import coordexp.detector", "import pipelines.stage1", "import pipelines.base.pretrain"],
)
def test_the_spin_is_bounded_before_torch_loads(statement: str, repository: Path) -> None:
    assert environment_after(statement, repository) == SPIN_ROUNDS


def test_who_has_decided_how_threads_wait_is_left_alone(repository: Path) -> None:
    assert environment_after("import coordexp", repository, **{POLICY_NAME: "PASSIVE"}) == "None"
    assert environment_after("import coordexp", repository, **{SPIN_NAME: "7"}) == "7"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {CUDA_ALLOCATOR_NAMES[0]: "expandable_segments:True"}),
        ({CUDA_ALLOCATOR_NAMES[1]: "backend:cudaMallocAsync"}, {CUDA_ALLOCATOR_NAMES[1]: "backend:cudaMallocAsync"}),
    ],
)
def test_the_allocator_on_cuda_grows_segments_unless_told_otherwise(
    said: dict[str, str], expected: dict[str, str]
) -> None:
    let_segments_grow(said)
    assert said == expected


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("100000 100000", 1),
        ("max 100000", None),
        ("50000 100000", 1),
        ("99999999 100000", None),
        ("", None),
        ("a b", None),
    ],
)
def test_a_container_bounds_the_cores(tmp_path: Path, quota: str, cores: int | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert usable_cores(file) == (cores or len(os.sched_getaffinity(0)))


def test_threads_are_set_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv(COUNT_NAME, "1")
    monkeypatch.setenv(SPIN_NAME, SPIN_ROUNDS)
    monkeypatch.delenv(POLICY_NAME, raising=False)
    before = torch.get_num_threads()
    caplog.set_level(logging.INFO, "coordexp")
    try:
        assert set_threads(0, LOG) is None
        assert torch.get_num_threads() == before
        assert "threads: default (OMP_NUM_THREADS=1)" in caplog.text
        assert set_threads(3, LOG) == torch.get_num_threads() == 3
        assert os.environ[COUNT_NAME] == "3"
        assert "threads: 3 (launch.threads)" in caplog.text
        assert f"spin {SPIN_ROUNDS} rounds" in caplog.text
        monkeypatch.delenv(COUNT_NAME)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
        (tmp_path / "cpu.max").write_text("150000 100000")
        assert set_threads(0, LOG, tmp_path / "cpu.max") == torch.get_num_threads() == 2
        assert "what this container grants" in caplog.text
    finally:
        torch.set_num_threads(before)
