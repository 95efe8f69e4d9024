"""A COCO folder of the user through all data stages, up to the pixels for the model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pipelines import convert, norm1000, pack, raw
from ruamel.yaml import YAML

from coordexp.config.loading import read_yaml
from coordexp.models.loading import load_checkpoint
from coordexp.packing.collator import Collator, teacher_segment
from coordexp.packing.samples import SampleStore
from coordexp.stage import stage_main
from records_folders import annotation, dataset, edit, write_photos, write_split


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The folder in which a small profile over two COCO folders ran its data stages."""
    root = tmp_path_factory.mktemp("datasets")
    write_split(root / "coco", "train2017", 1, 24)
    write_split(root / "coco", "val2017", 100, 8)
    write_split(root / "more", "train2017", 1, 8, [annotation(5000, 3, 4, [1, 1, 60, 40], iscrowd=1)])
    edit(root / "more", "train2017", categories=lambda old: [*old, {"id": 9, "name": "<|im_end|>"}])
    for path in (root / "more" / "train2017").iterdir():
        path.write_bytes(path.read_bytes() + b"\0")  # different files, so that the content hashes differ
    write_profile(repository, root)
    for stage in (raw, convert, norm1000, pack):
        assert stage_main(stage.run, ["--params", str(root / "params.yaml"), "--out", str(root)]) == 0
    return root


def write_profile(repository: Path, root: Path) -> None:
    keys: dict[str, Any] = {
        "format": "coco", "train": "annotations/instances_train2017.json", "val": "none",
        "train_images": "train2017", "val_images": "val2017", "weight": 2.0, "prompt": "listed",
    }  # fmt: skip
    coco = keys | {"root": str(root / "coco"), "val": "annotations/instances_val2017.json", "weight": 1.0}
    write_sets(repository, root, {"coco": coco, "more": keys | {"root": str(root / "more")}})


def write_sets(repository: Path, root: Path, sets: dict[str, Any]) -> None:
    profile = read_yaml(repository / "configs" / "smoke.yaml")
    profile["source"] = {"kind": "datasets", "verify": "decode", "sets": sets}
    profile["model"]["path"] = str(repository / "models" / "tiny-base")
    profile["records"] |= {"negative_rate": 0.3, "dev_images": 4}
    params = read_yaml(repository / "params.yaml") | {"profile": "mine"}
    (root / "configs").mkdir()
    YAML().dump(profile, root / "configs" / "mine.yaml")
    YAML().dump(params, root / "params.yaml")


def test_samples_have_only_prompted_names_and_images_are_read_in_place(out: Path) -> None:
    store = SampleStore(out / "data" / "mine" / "norm1000" / "train.parquet")
    records = [
        json.loads(line) for line in (out / "data" / "mine" / "records" / "train.jsonl").read_text().splitlines()
    ]
    assert len(store) == len(records)
    checkpoint = load_checkpoint(out / "data" / "mine" / "norm1000" / "init")
    empty = 0
    for sample, record in zip(store, records, strict=True):
        asked = record["metadata"].get("prompt", {}).get("names")
        there = {o["desc"] for o in record["objects"] if not o.get("metadata", {}).get("iscrowd")}
        assert set(sample.descs) - {"red mug"} == (there if asked is None else there & set(asked)) - {"red mug"}
        prompt = checkpoint.tokenizer.decode(sample.prompt_ids.tolist())
        assert all(name in prompt for name in asked or ())
        empty += not sample.descs
    assert 0 < empty < len(store) / 2
    collator = Collator(
        out / "data" / "mine" / "raw",
        checkpoint.pixels,
        checkpoint.model.config.image_token_id,
        checkpoint.tokenizer.pad_token_id,
        256,
    )
    batch = collator([teacher_segment(store[i]) for i in (0, len(store) - 1)])
    assert np.isfinite(batch.pixel_values.numpy()).all()
    assert {Path(store[i].image).parts[0] for i in (0, len(store) - 1)} == {"coco", "more"}


def test_dropped_annotations_are_written_to_files(out: Path) -> None:
    records = out / "data" / "mine" / "records"
    assert json.loads((records / "drops.json").read_text()) == {"train": {}, "val": {}}
    assert (records / "dropped.jsonl").read_text() == ""
    sets = json.loads((records / "sets.json").read_text())
    assert sets["more"]["val"] == 0
    assert sets["more"]["train"] % 2 == 0


@pytest.mark.parametrize("fmt", ["yolo", "voc", "labelme"])
def test_a_label_file_that_is_edited_is_converted_again(
    fmt: str, tmp_path: Path, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Labels next to images: convert refuses files that raw has not seen; after raw, convert runs again."""
    write_photos(fmt, tmp_path / "set", {"train": 9, "val": 3})
    write_sets(repository, tmp_path, {"mine": dataset(fmt, tmp_path / "set").model_dump(exclude_defaults=True)})

    def run(stage: ModuleType) -> int:
        return stage_main(stage.run, ["--params", str(tmp_path / "params.yaml"), "--out", str(tmp_path)])

    def descs() -> Counter[str]:
        paths = (tmp_path / "data/mine/records").glob("*.jsonl")
        rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        return Counter(o["desc"] for row in rows for o in row["objects"])

    manifest = tmp_path / "data/mine/raw/manifest.json"
    assert (run(raw), run(convert)) == (0, 0)
    first, before = manifest.read_bytes(), descs()
    (label,) = (p for p in (tmp_path / "set").rglob("train003.*") if p.suffix != ".jpg")
    old, new = {"yolo": ("\n2 ", "\n0 "), "voc": ("cat", "person"), "labelme": ("cat", "person")}[fmt]
    label.write_text(f"\n{label.read_text()}".replace(old, new).removeprefix("\n"))
    assert run(convert) == 2
    assert "changed since the raw stage inspected set 'mine'; run it again" in capfd.readouterr().err
    assert (run(raw), run(convert)) == (0, 0)
    assert manifest.read_bytes() != first
    assert descs() == before - Counter({"cat": 1}) + Counter({"person": 1})
