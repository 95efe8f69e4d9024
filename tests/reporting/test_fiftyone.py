"""`coordexp browse`: what FiftyOne is given, by a stand-in that keeps it; and what is said without FiftyOne."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from coordexp import cli
from coordexp.errors import ConfigError
from coordexp.evaluation.protocol import STANDARD
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction, write_results
from coordexp.records.shards import write_shards
from coordexp.reporting.fiftyone_app import browse_answers, field_names

CAT, OFF = (10.0, 20.0, 60.0, 60.0), (70.0, 5.0, 90.0, 30.0)
CATEGORIES = [Category(1, "cat"), Category(2, "dog")]


class NoDatabase(ValueError):
    """As FiftyOne's own, of an installation without MongoDB."""


class Fake(ModuleType):
    """The few calls of FiftyOne that are made, and what came of them."""

    def __init__(self) -> None:
        super().__init__("fiftyone")
        self.samples: list[dict[str, Any]] = []
        self.launched: list[Any] = []
        self.deleted: list[str] = []
        self.info: dict[str, Any] = {}
        self.core = SimpleNamespace(config=SimpleNamespace(FiftyOneConfigError=NoDatabase))

    def list_datasets(self) -> list[str]:
        return ["mine"]

    def Sample(self, filepath: str) -> dict[str, Any]:
        return {"filepath": filepath}

    def Detections(self, detections: list[Any]) -> list[Any]:
        return detections

    def Detection(self, **fields: Any) -> dict[str, Any]:
        return fields

    def Dataset(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            add_samples=self.samples.extend, info=self.info, save=lambda: None, delete=lambda: self.deleted.append(name)
        )

    def launch_app(self, dataset: Any, port: int) -> SimpleNamespace:
        self.launched.append(port)
        for sample in self.samples:
            with Image.open(sample["filepath"]) as picture:  # while the app is open
                assert picture.size == (100, 80)
        return SimpleNamespace(wait=self.launched.append)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setitem(sys.modules, "fiftyone", found)
    return found


def answered(desc: str, image: str = "a.png") -> list[ImageResult]:
    """One image with a cat, which is called this, and a false box."""
    pred = (Prediction(desc, CAT, (100, 250, 600, 750), (-1.0,) * 4, -0.1, 0.75), Prediction("cat", OFF, score=0.5))
    return [ImageResult(7, image, 100, 80, (GroundTruth("cat", CAT),), pred, "{}", ParseReport(True, 2), "stop", 9)]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (100, 80), "navy").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_samples_have_the_fields_of_the_page(fake: Fake, picture: Path) -> None:
    runs = {"stage2": answered("cat"), "stage1-control": answered("dog")}
    browse_answers(runs, CATEGORIES, picture.parent, STANDARD, 10, "new", 5151)
    (sample,) = fake.samples
    assert sample["filepath"] == str(picture)
    about = {"iscrowd": False, "found_by": ["stage2"]}
    assert sample["annotation"] == [{"label": "cat", "bounding_box": [0.1, 0.25, 0.5, 0.5], **about}]
    first, second = sample["stage2"][0], sample["stage1_control"][0]
    assert (first["cause"], second["cause"], second["label"]) == ("right", "classification", "dog")
    assert (second["belongs_to"], sample["stage2"][1].get("belongs_to")) == ("cat", None)
    assert (first["confidence"], first["bins"], first["logprob"]) == (0.75, [100, 250, 600, 750], [-1.0] * 4)
    counts = {name: sample[f"stage1_control_{name}"] for name in ("f1", "false", "missed", "duplicate_pairs", "parses")}
    assert counts == {"f1": 0.0, "false": 2, "missed": 1, "duplicate_pairs": 0, "parses": True}
    assert set(fake.info["totals"]) == {"stage2", "stage1-control"}
    assert fake.launched == [5151, -1]
    assert fake.deleted == ["new"]


def test_images_from_archives_are_temporary_files(fake: Fake, picture: Path, tmp_path: Path) -> None:
    root = tmp_path / "packed"
    root.mkdir()
    write_shards(root, {"images": [("images/a.png", picture.read_bytes())]})
    browse_answers({"one": answered("cat", "images/a.png")}, CATEGORIES, root, STANDARD, 10, "new", 5151)
    assert fake.launched == [5151, -1]
    assert not Path(fake.samples[0]["filepath"]).exists()


def test_runs_become_fields_with_distinct_names() -> None:
    assert field_names(["stage2", "stage1-control", "stage1 control", "filepath", "7b", "+"]) == [
        "stage2", "stage1_control", "stage1_control_3", "run_filepath", "run_7b", "run",
    ]  # fmt: skip


def test_an_installation_without_its_database_is_reported_to_the_user(
    fake: Fake, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> list[str]:
        raise NoDatabase("MongoDB could not be installed")

    monkeypatch.setattr(fake, "list_datasets", refuse)
    with pytest.raises(ConfigError, match="cannot reach its database: MongoDB"):
        browse_answers({"one": answered("cat")}, CATEGORIES, picture.parent, STANDARD, 10, "new", 5151)


@pytest.mark.parametrize(
    ("installed", "name", "words"),
    [(False, "new", "pip install 'coordexp[browse]'"), (True, "mine", "FiftyOne already has this data set")],
)
def test_missing_packages_and_used_names_are_reported(
    fake: Fake, picture: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    installed: bool, name: str, words: str,
) -> None:  # fmt: skip
    if not installed:
        monkeypatch.setitem(sys.modules, "fiftyone", None)
    file = picture.with_name("stage2.jsonl")
    write_results(file, answered("cat"))
    with pytest.raises(SystemExit) as done:
        cli.main(["browse", str(file), "--images", str(picture.parent), "--name", name])
    assert done.value.code == 2
    assert words in capfd.readouterr().err
    assert fake.deleted == []
