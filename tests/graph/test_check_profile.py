"""`make check-profile`: a sample of the user's data, one training step, and the plan, without leaving files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipelines import check_profile
from ruamel.yaml import YAML

from coordexp.config.loading import read_yaml
from coordexp.stage import stage_main
from records_folders import coco_set, write_split


@pytest.fixture
def root(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile over a COCO folder of 40 and 20 images."""
    write_split(tmp_path / "coco", "train2017", 1, 40)
    write_split(tmp_path / "coco", "val2017", 100, 20)
    profile: dict[str, Any] = read_yaml(repository / "configs" / "smoke.yaml")
    profile["source"] = {
        "kind": "datasets",
        "verify": "header",
        "sets": {"coco": coco_set(tmp_path / "coco").model_dump()},
    }
    profile["model"]["path"] = str(repository / "models" / "tiny-base")
    (tmp_path / "configs").mkdir()
    YAML().dump(profile, tmp_path / "configs" / "mine.yaml")
    YAML().dump(read_yaml(repository / "params.yaml") | {"profile": "mine"}, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def test_a_valid_profile_passes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {path.name for path in root.iterdir()}
    with caplog.at_level("INFO"):
        assert stage_main(check_profile.run, []) == 0
    assert "sample: train: {'samples': 14" in caplog.text  # 16, of which two are dev
    assert "sample: val: {'samples': 16" in caplog.text
    assert "sample: one training step, loss" in caplog.text
    assert "train: 40 records, 80 objects" in caplog.text  # the plan is that of the whole set
    assert "hours on one device" in caplog.text
    assert {path.name for path in root.iterdir()} - before <= {".resume"}
    assert not list((root / ".resume").glob("*"))


def test_a_profile_that_would_stop_is_reported(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / "coco" / "train2017" / f"{1:012d}.jpg").unlink()
    assert stage_main(check_profile.run, []) == 2
    assert "STOP" in capfd.readouterr().err


def test_a_folder_that_is_not_a_model_is_reported(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profile = read_yaml(root / "configs" / "mine.yaml")
    profile["model"]["path"] = str(root / "coco")
    YAML().dump(profile, root / "configs" / "mine.yaml")
    assert stage_main(check_profile.run, []) == 2
    assert "no config.json" in capfd.readouterr().err
