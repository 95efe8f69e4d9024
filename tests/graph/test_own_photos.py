"""Folders of a user, one per supported format, from `coordexp init` to the report of `dvc repro`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from coordexp.config.loading import read_yaml
from coordexp.records.recognize import recognize_folder
from records_folders import LAYOUTS, QUESTIONS, write_photos
from smoke_clone import STAGES, new_clone

pytestmark = pytest.mark.slow


def test_folders_in_every_format_reach_a_report(
    tmp_path: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory, warm: Path
) -> None:
    clone = new_clone(repository, tmp_path / "clone", tmp_path_factory.mktemp("home"), warm=warm)
    sets = {}
    for number, fmt in enumerate(LAYOUTS | QUESTIONS):
        folder = tmp_path / "photos" / fmt
        write_photos(fmt, folder, {"train": 4, "val": 2}, size=(64 + number, 48))  # all with different content
        found, *_ = recognize_folder(folder)
        sets[fmt.replace("_", "-")] = found.keys
    told = clone.succeed("coordexp", "init", str(tmp_path / "photos" / "yolo"), "--base", "smoke", "--name", "mine")
    assert "next: coordexp doctor --profile mine" in told
    profile = clone.root / "configs" / "mine.yaml"
    tree = read_yaml(profile)
    tree["source"]["sets"] = sets
    with profile.open("w", encoding="utf-8") as out:
        YAML().dump(tree, out)
    params = clone.root / "params.yaml"
    params.write_text(re.sub(r"(?m)^profile: \S+", "profile: mine", params.read_text()))
    clone.commit("photos")
    clone.succeed("coordexp", "doctor", "--profile", "mine")
    output = clone.succeed("dvc", "repro")
    assert set(re.findall(r"Running stage '([^']+)'", output)) == set(STAGES)
    counts = json.loads((clone.root / "data/mine/records/sets.json").read_text())
    assert counts.keys() == sets.keys()
    assert min(found["train"] for found in counts.values()) > 0
    assert (clone.root / "reports/mine/progress.md").read_text().strip()
