"""The notebook runs from its first cell to its last in a clone where the smoke profile ran; `tiny` reads `smoke`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from smoke_clone import Clone
from source_tree import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    """The notebook, which nbformat finds valid."""
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_git_contains_no_outputs(path: Path) -> None:
    """They would be those of an older run, and most of the bytes."""
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert cells
    assert [cell.outputs for cell in cells] == [[]] * len(cells)
    assert {cell.execution_count for cell in cells} == {None}


def showing(cells: Sequence[Any], kind: str) -> int:
    """How many cells showed something of this MIME type."""
    return sum(any(kind in out.get("data", ()) for out in cell.outputs) for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_cell_runs(
    path: Path, clone: Clone, reproduced: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (clone.environment | {"IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}).items():
        monkeypatch.setenv(name, value)  # for the kernel, a process of its own
    notebook = read(path)
    for cell in notebook.cells:
        cell.source = re.sub(r"\btiny\b", "smoke", cell.source)
    # Where Jupyter starts it.
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(clone.root / "notebooks")}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert (showing(code, "image/png"), showing(code, "text/html")) == (4, 3)
