"""A COCO folder of the user through the data stages, as processes would run them, up to pixels for the model."""

from __future__ import annotations

import json
from pathlib import Path
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
from records_folders import annotation, edit, write_split


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The folder in which a small profile over two COCO folders ran its data stages."""
    root = tmp_path_factory.mktemp("datasets")
    write_split(root / "coco", "train2017", 1, 24)
    write_split(root / "coco", "val2017", 100, 8)
    write_split(root / "more", "train2017", 1, 8, [annotation(5000, 3, 4, [1, 1, 60, 40], iscrowd=1)])
    edit(root / "more", "train2017", categories=lambda old: [*old, {"id": 9, "name": "<|im_end|>"}])
    for path in (root / "more" / "train2017").iterdir():
        path.write_bytes(path.read_bytes() + b"\0")  # other files, for the sake of the content hashes
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
    profile = read_yaml(repository / "configs" / "smoke.yaml")
    profile["source"] = {"kind": "datasets", "verify": "decode", "sets": {"coco": coco}}
    profile["source"]["sets"]["more"] = keys | {"root": str(root / "more")}
    profile["model"]["path"] = str(repository / "models" / "tiny-base")
    profile["records"] |= {"negative_rate": 0.3, "dev_images": 4}
    params = read_yaml(repository / "params.yaml") | {"profile": "mine"}
    (root / "configs").mkdir()
    YAML().dump(profile, root / "configs" / "mine.yaml")
    YAML().dump(params, root / "params.yaml")


def test_samples_name_only_what_was_asked_and_images_are_read_where_they_lie(out: Path) -> None:
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


def test_losses_are_on_file(out: Path) -> None:
    records = out / "data" / "mine" / "records"
    assert json.loads((records / "drops.json").read_text()) == {"train": {}, "val": {}}
    assert (records / "dropped.jsonl").read_text() == ""
    sets = json.loads((records / "sets.json").read_text())
    assert sets["more"]["val"] == 0
    assert sets["more"]["train"] % 2 == 0
