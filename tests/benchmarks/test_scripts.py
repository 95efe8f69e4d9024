"""Every benchmark runs at toy size. Its assertions of equal results hold there too; its times are meaningless."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from benchmarks.__main__ import scripts

from benchmarks import harness

# Loading torch, a tokenizer of 151,669 tokens or a dozen processes takes ten seconds of a test machine.
FAST = {"packing_plan", "bootstrap", "graph_times"}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in scripts()])
def test_runs_at_toy_size(name: str, repository: Path, warm: Path, tmp_path: Path) -> None:
    command = ["python", "-m", f"benchmarks.{name}", "--quick", "--out", str(tmp_path)]
    environment = {"PYTHONPATH": str(repository / "src"), "PATH": f"{warm}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = harness.load(name, tmp_path)
    assert rows
    assert all(row.value is not None or row.beside for row in rows)
