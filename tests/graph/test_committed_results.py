"""The committed results are from one run: files match dvc.lock, and the report read what the run wrote."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from coordexp.config.loading import read_yaml
from source_tree import ROOT

LOCK = read_yaml(ROOT / "dvc.lock")["stages"]
OUTS: dict[str, dict[str, Any]] = {out["path"]: out for stage in LOCK.values() for out in stage.get("outs", [])}
IN_GIT = set(subprocess.run(["git", "ls-files", "reports"], cwd=ROOT, capture_output=True, text=True).stdout.split())
REPORTS = sorted(path for path in OUTS if path in IN_GIT)
PAGE = next(path for path in REPORTS if path.endswith("progress.md"))


@pytest.mark.parametrize("path", REPORTS)
def test_a_result_in_git_is_what_the_run_wrote(path: str) -> None:
    found = hashlib.md5((ROOT / path).read_bytes(), usedforsecurity=False).hexdigest()
    assert found == OUTS[path]["md5"], f"{path} is stale or was edited: `dvc repro`, and commit it with dvc.lock"


@pytest.mark.parametrize("stage", LOCK)
def test_every_stage_read_what_the_stage_before_it_wrote(stage: str) -> None:
    read = {dep["path"]: dep["md5"] for dep in LOCK[stage]["deps"] if dep["path"] in OUTS}
    stale = [path for path, md5 in read.items() if md5 != OUTS[path]["md5"]]
    assert stale == [], f"{stage} is older than these: `dvc repro {stage}`"


def test_page_one_is_complete_in_git_and_small() -> None:
    """Every experiment commits these anew; the images behind page one are in DVC's cache."""
    page = ROOT / PAGE
    linked = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")))
    folder = page.parent
    place = f"{folder.relative_to(ROOT)}/"
    on_demand = (f"{place}trajectory/", f"{place}decoding.")  # studies that the graph does not make
    in_git = {path for path in IN_GIT if path.startswith(place) and not path.startswith(on_demand)}
    pictures = {path for path in in_git if Path(path).suffix in (".png", ".jpg")}
    assert {f"{folder.relative_to(ROOT)}/{name}" for name in linked} == pictures
    assert len(pictures) <= 8
    assert sum((ROOT / path).stat().st_size for path in in_git) < 350_000
