"""The results in git are those of one run: files are what dvc.lock names, and the report read what the run wrote."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import pytest

from coordexp.config.loading import read_yaml
from source_tree import ROOT

LOCK = read_yaml(ROOT / "dvc.lock")["stages"]
OUTS: dict[str, dict[str, Any]] = {out["path"]: out for stage in LOCK.values() for out in stage.get("outs", [])}
REPORTS = sorted(path for path in OUTS if path.startswith("reports/") and "nfiles" not in OUTS[path])
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


def test_the_pictures_of_the_report_are_in_git_and_no_others() -> None:
    page = ROOT / PAGE
    linked = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")))
    assert linked == {path.relative_to(page.parent).as_posix() for path in (page.parent / "pictures").iterdir()}
