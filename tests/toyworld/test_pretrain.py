"""Pretraining of the embedded base model, from composed scenes to a checkpoint, in two steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from coordexp.models.loading import load_checkpoint
from coordexp.packing.samples import SampleStore
from coordexp.text.codecs import Role
from helpers import SCENES, SPRITES, new_tokenizer, tiny_pixels
from toyworld.coco_folder import write_coco_folder
from toyworld.pretrain import digit_segment, legs, prepare_base_samples, pretrain

SHARES = {"name": 0.3, "count": 0.2, "detect_tags": 0.2}
PARAMS = {
    "seed": 3,
    "sprites": str(SPRITES),
    "phases": {"few": {"steps": 2, "settle": True, "samples_per_step": 3, "task_shares": SHARES}},
    "train": {
        "pack_tokens": 320, "lr": 0.002, "warmup_steps": 1, "decay_fraction": 0.25,
        "weights": {"desc": 3.0, "localiser": 0.5, "localiser_sigma": 10.0},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scenes of one phase."""
    folder = tmp_path_factory.mktemp("base")
    write_coco_folder(folder / "data" / "few", SCENES, seed=3, workers=1)
    return folder


def test_the_localiser_reads_each_coordinate_from_its_first_digit(home: Path, tmp_path: Path) -> None:
    prepare_base_samples(home / "data" / "few", tmp_path / "few.parquet", new_tokenizer(), tiny_pixels(), {}, seed=3)
    store = SampleStore(tmp_path / "few.parquet")
    assert len(store) == SCENES.train_images
    for sample in store:
        segment = digit_segment(sample)
        assert segment.box_tokens.shape == segment.box_targets.shape == (len(sample.descs), 4)
        first = segment.box_tokens.ravel()
        assert (sample.answer_roles[first] == Role.NUMBER).all()
        assert (sample.answer_roles[first - 1] != Role.NUMBER).all()
        assert (np.abs(segment.box_targets - 1000 * sample.boxes_xyxy_px / np.array(
            [sample.width, sample.height] * 2)) <= 1).all()  # fmt: skip


def test_a_checkpoint_of_plain_digits_comes_out_and_a_run_continues(home: Path, tmp_path: Path) -> None:
    pretrain(home, tmp_path / "state", PARAMS)
    checkpoint = load_checkpoint(home / "checkpoint")
    assert checkpoint.coord is None  # no coordinate token yet
    assert json.loads((home / "metrics.json").read_text())["steps"] == 2
    weights = (home / "checkpoint" / "model.safetensors").read_bytes()
    pretrain(home, tmp_path / "state", PARAMS)  # all steps are done: nothing is trained again
    assert (home / "checkpoint" / "model.safetensors").read_bytes() == weights


def test_the_rate_comes_down_where_a_phase_settles() -> None:
    phases = {
        name: {"steps": n, "settle": settles} for name, n, settles in (("a", 3, False), ("b", 4, True), ("c", 5, False))
    }
    assert legs(phases) == [7, 5]
