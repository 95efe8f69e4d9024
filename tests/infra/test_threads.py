"""Threads of torch: their number, and how long idle ones spin."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coordexp.infra.threads import (
    COUNT_FILE,
    COUNT_NAME,
    CUDA_ALLOCATOR_NAMES,
    POLICY_NAME,
    SPIN_NAME,
    SPIN_ROUNDS,
    hold_threads,
    let_segments_grow,
    set_threads,
    usable_cores,
)

LOG = logging.getLogger("coordexp")


def environment_after(statement: str, repository: Path, **variables: str) -> str:
    """The value of GOMP_SPINCOUNT when torch loads, after a statement in a fresh interpreter."""
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


@pytest.mark.parametrize("module", ["coordexp.cli", "coordexp.detector", "pipelines.base.pretrain"])
def test_the_spin_is_bounded_before_torch_loads(module: str, repository: Path) -> None:
    assert environment_after(f"import {module}", repository) == SPIN_ROUNDS


def test_every_stage_bounds_the_spin_before_it_loads_torch(repository: Path) -> None:
    """In one interpreter, which removes the variable and our modules after each stage."""
    entries = sorted(
        f"pipelines.{path.stem}" for path in (repository / "pipelines").glob("*.py") if path.stem[0] != "_"
    )
    script = f"""
import importlib, os, sys
seen = []
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            seen.append(os.environ.get("{SPIN_NAME}"))
            raise ImportError("torch")
sys.meta_path.insert(0, Finder)
for entry in {entries}:
    os.environ.pop("{SPIN_NAME}", None)
    for name in [n for n in sys.modules if n.split(".")[0] in ("coordexp", "pipelines", "toyworld", "transformers")]:
        del sys.modules[name]
    seen.clear()
    try:
        importlib.import_module(entry)
    except ImportError:
        pass
    print(entry, seen[0] if seen else os.environ.get("{SPIN_NAME}"))
"""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    paths = f"{repository / 'src'}{os.pathsep}{repository}"
    done = subprocess.run(
        [sys.executable, "-c", script], env=own | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{entry} {SPIN_ROUNDS}" for entry in entries]
    assert len(entries) >= 12


def test_test_workers_bound_the_spin_too() -> None:
    assert os.environ.get(SPIN_NAME) == SPIN_ROUNDS or POLICY_NAME in os.environ
    assert torch.get_num_threads() == int(os.environ[COUNT_NAME])


def test_a_wait_policy_of_the_user_is_kept(repository: Path) -> None:
    assert environment_after("import coordexp", repository, **{POLICY_NAME: "PASSIVE"}) == "None"
    assert environment_after("import coordexp", repository, **{SPIN_NAME: "7"}) == "7"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {CUDA_ALLOCATOR_NAMES[0]: "expandable_segments:True"}),
        ({CUDA_ALLOCATOR_NAMES[1]: "backend:cudaMallocAsync"}, {CUDA_ALLOCATOR_NAMES[1]: "backend:cudaMallocAsync"}),
    ],
)
def test_the_cuda_allocator_grows_segments_unless_configured_otherwise(
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
def test_a_container_quota_limits_the_cores(tmp_path: Path, quota: str, cores: int | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert usable_cores(file) == (cores or len(os.sched_getaffinity(0)))


def test_threads_are_set_and_logged(
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
        assert "the quota of this container" in caplog.text
    finally:
        torch.set_num_threads(before)


def test_a_resumed_run_keeps_its_number_of_threads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_num_threads()
    try:
        hold_threads(tmp_path / "other", LOG, writes=False)
        assert not (tmp_path / "other").exists()
        torch.set_num_threads(3)
        hold_threads(tmp_path / "state", LOG)
        hold_threads(tmp_path / "state", LOG)
        assert (torch.get_num_threads(), caplog.text) == (3, "")
        torch.set_num_threads(1)
        hold_threads(tmp_path / "state", LOG)
        assert torch.get_num_threads() == 3
        assert "threads: 3 instead of 1: this run started with them" in caplog.text
        for damaged in (b"", b"0", b"-1", b"9999999", b"\xff\xfe"):
            (tmp_path / "state" / COUNT_FILE).write_bytes(damaged)
            torch.set_num_threads(2)
            hold_threads(tmp_path / "state", LOG, writes=False)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
