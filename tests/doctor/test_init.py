"""`coordexp init`: from a folder in any format to a profile that doctor accepts and the stages can run."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pipelines import convert, decode, norm1000, pack, raw, rollout, stage1, stage1_control, stage2

from coordexp import cli
from coordexp.config.loading import load_profile, read_yaml
from coordexp.config.profile import DatasetsConfig, Profile
from coordexp.config.run import RunConfig
from coordexp.doctor import first_profile
from coordexp.doctor.diagnosis import diagnose
from coordexp.doctor.page import decoded_px
from coordexp.doctor.shown import Preview
from coordexp.doctor.timing import StepTime, timed_step
from coordexp.errors import ConfigError, DataError
from coordexp.records.gt_vs_pred import read_results
from coordexp.records.images import image_roots
from records_folders import LAYOUTS, NAMES, QUESTIONS, picture, write_photos

DATA_STAGES = (raw, convert, norm1000, pack)
TRAIN_STAGES = (*DATA_STAGES, stage1, rollout, stage2, stage1_control)


@pytest.fixture
def clone(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository to write profiles into, and to run stages in."""
    root = tmp_path / "clone"
    root.mkdir()
    shutil.copytree(repository / "configs", root / "configs")
    shutil.copy(repository / "params.yaml", root)
    (root / "models").mkdir()
    (root / "models" / "tiny-base").symlink_to(repository / "models" / "tiny-base")
    monkeypatch.chdir(root)
    monkeypatch.setenv("DVC_ROOT", str(root))
    image_roots.cache_clear()
    return root


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_profile, "timed_step", lambda run, samples: StepTime(3.0, 1000))


def init(folder: Path, base: str | None = "smoke", name: str | None = "mine") -> list[str]:
    return list(first_profile.init(folder, name, base, Path("params.yaml")))


def run_of(name: str = "mine") -> RunConfig:
    return RunConfig.read(Path("params.yaml"), name, Path())


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize("fmt", sorted(LAYOUTS | QUESTIONS))
def test_every_format_goes_through_init_doctor_and_the_data_stages(clone: Path, tmp_path: Path, fmt: str) -> None:
    write_photos(fmt, tmp_path / "set", {"train": 14, "val": 4})
    lines = init(tmp_path / "set")
    assert lines[0].startswith(f"{tmp_path / 'set'}: {fmt}: ")
    n_records = 14 * (2 if fmt in QUESTIONS else 1)
    assert any(line.startswith(f"train: {n_records} images, 28 objects, ") for line in lines)
    assert any("about 1 minutes" in line for line in lines)
    assert lines[-2].startswith("next: coordexp doctor --profile mine")
    diagnosis = diagnose(run_of(), decode=True)
    assert not diagnosis.stops, diagnosis.lines
    for stage in DATA_STAGES:
        stage.run(run_of())
    counts = json.loads((run_of().paths.norm1000 / "summary.json").read_text())
    assert counts["train"]["samples"] + counts["dev"]["samples"] == n_records
    assert counts["val"]["objects"] == 8


@pytest.mark.parametrize("fmt", ["coco", "yolo", "voc"])
def test_a_folder_without_val_goes_through_the_stages(clone: Path, tmp_path: Path, fmt: str) -> None:
    write_photos(fmt, tmp_path / "set", {"train": 30})
    lines = init(tmp_path / "set")  # with real steps of the real model
    seconds = next(re.search(r"takes (\d+\.\d\d) s here", line) for line in lines if line.startswith("time: "))
    assert seconds
    assert float(seconds[1]) > 0
    run = run_of()
    stages = TRAIN_STAGES if fmt == "yolo" else DATA_STAGES
    for stage in stages:
        stage.run(run)
    assert (run.paths.packed / "plan.parquet").is_file()
    if fmt == "yolo":
        decode.run(run, "stage2")
        answered = list(read_results(run.paths.root / "runs" / "mine" / "decode" / "stage2" / "answers.jsonl"))
        assert len(answered) >= 1


@pytest.mark.usefixtures("instant")
def test_a_profile_contains_only_differences(clone: Path, tmp_path: Path) -> None:
    write_photos("coco", tmp_path / "My Photos (2)", {"train": 28, "val": 10})
    lines = init(tmp_path / "My Photos (2)", base=None, name=None)
    path = clone / "configs" / "my-photos-2.yaml"
    tree, base = read_yaml(path), load_profile(clone / "configs" / "tiny.yaml")
    assert tree["extends"] == "tiny"
    assert "model" not in tree  # the pinned one of the profile that it extends
    same = [f"{b}.{k}" for b, keys in tree.items() if b not in ("extends", "source") for k, v in keys.items()
            if getattr(getattr(base, b), k) == v]  # fmt: skip
    assert same == []
    profile = load_profile(path)
    assert isinstance(profile, Profile)
    assert isinstance(profile.source, DatasetsConfig)
    assert profile.records.dev_images == 3
    assert 100 <= profile.stage1.steps <= base.stage1.steps
    assert str(path.relative_to(clone)) in "".join(lines)
    with pytest.raises(ConfigError, match="this profile exists already and is not replaced"):
        init(tmp_path / "My Photos (2)", base=None, name=None)


@pytest.mark.usefixtures("instant")
def test_packs_and_answers_fit_crowded_images(clone: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(12):
        picture(i).save(root / "images" / f"{i}.jpg")
        rows += [
            {"id": 100 * i + j, "image_id": i, "category_id": 1, "bbox": [j, j % 7, 10, 12], "iscrowd": 0}
            for j in range(40)
        ]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(12)]
    source = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cat"}]}
    (root / "annotations.json").write_text(json.dumps(source))
    lines = init(root)
    run = run_of()
    preview = Preview(run)
    (longest,) = {s.length for s in preview.samples(diagnose(run, decode=False).records["train"])}
    assert longest > load_profile(clone / "configs" / "smoke.yaml").packing.pack_tokens
    assert longest <= run.profile.packing.pack_tokens < longest + 32
    asked = re.search(r"decode\.max_new_tokens=(\d+)", lines[-1])
    assert asked
    assert int(asked[1]) > 40 * 8


@pytest.mark.usefixtures("instant")
def test_another_model_is_pinned(clone: Path, tmp_path: Path, repository: Path) -> None:
    write_photos("yolo", tmp_path / "set", {"train": 12, "val": 4})
    shutil.copytree(repository / "models" / "tiny-base", clone / "models" / "other")
    init(tmp_path / "set", base="models/other")
    model = read_yaml(clone / "configs" / "mine.yaml")["model"]
    assert model["path"] == "models/other"
    assert set(model["files"]) >= {"config.json", "model.safetensors"}


def test_unrecognized_files_are_listed(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "set" / f"{i}.jpg")
    (tmp_path / "set" / "notes.md").write_text("mine")
    with pytest.raises(DataError, match=r"no annotations were recognized\. Found 3 \.jpg, 1 \.md"):
        init(tmp_path / "set")
    assert not (clone / "configs" / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("name", "base", "message"), [("Mine!", "smoke", "expected lowercase letters"), ("mine", "nope", "neither")]
)
def test_invalid_arguments_are_reported(clone: Path, tmp_path: Path, name: str, base: str, message: str) -> None:
    write_photos("coco", tmp_path / "set", {"train": 4})
    with pytest.raises(ConfigError, match=message):
        init(tmp_path / "set", base, name)


@pytest.mark.usefixtures("instant")
def test_the_page_shows_boxes_from_their_bins(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos("voc", tmp_path / "set", {"train": 14, "val": 4})
    init(tmp_path / "set")
    (tmp_path / "set" / "JPEGImages" / "train003.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--profile", "mine", "--page", "page.html", "--out", "faults.jsonl"])
    assert stopped.value.code == 2
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 17  # without the damaged image
    assert "<script" not in page
    assert all(f"<td>{name}</td>" in page for name in ("cat", "red mug"))
    assert '<span class="stop">STOP: ' in page
    faults = [json.loads(line) for line in Path("faults.jsonl").read_text().splitlines()]
    assert [f["reason"] for f in faults] == ["image_unreadable"]


@pytest.mark.usefixtures("instant")
def test_decoded_boxes_match_the_annotated_ones(clone: Path, tmp_path: Path) -> None:
    write_photos("coco", tmp_path / "set", {"train": 6, "val": 4})
    init(tmp_path / "set")
    run = run_of()
    for sample in Preview(run).samples(diagnose(run, decode=False).records["train"]):
        scale = np.tile((sample.resized_width / sample.width, sample.resized_height / sample.height), 2)
        bin_px = np.tile((sample.resized_width, sample.resized_height), 2) / 1000
        assert (np.abs(decoded_px(sample) - sample.boxes_xyxy_px * scale) <= bin_px / 2 + 1e-4).all()
        assert set(sample.descs) <= set(NAMES)


def test_real_steps_are_taken(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos("coco", tmp_path / "set", {"train": 8, "val": 4})
    timed = []
    monkeypatch.setattr(
        first_profile, "timed_step", lambda run, samples: timed.append((run, samples)) or StepTime(1, 1)
    )
    init(tmp_path / "set")
    ((run, samples),) = timed
    before = sorted(os.listdir(clone))
    step = timed_step(run, samples)
    assert 0 < step.seconds < 60
    assert 0 < step.tokens <= run.profile.stage1.packs_per_step * run.profile.packing.pack_tokens
    assert sorted(os.listdir(clone)) == before
