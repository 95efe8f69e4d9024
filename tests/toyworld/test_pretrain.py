"""Pretraining of the embedded base model, from composed scenes to a checkpoint, in two steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coordexp.errors import ConfigError
from coordexp.models.loading import load_checkpoint
from coordexp.packing.samples import SampleStore
from coordexp.text.codecs import Role
from helpers import SCENES, SPRITES, catalog, new_tokenizer, tiny_pixels
from toyworld.coco_folder import write_coco_folder
from toyworld.pretrain import digit_segment, prepare_base_samples, pretrain, segment_steps

PROMPTS = {
    "mixed_listed": 0.4, "mixed_phrase": 0.2, "listed_names": 5, "listed_present": 0.7, "listed_hard": 0.5,
    "negative_rate": 0.3, "flip": 0.5,
}  # fmt: skip
PHASE = {
    "steps": 2, "settle": True, "samples_per_step": 3, "draws": 6, "prompts": PROMPTS,
    "task_fractions": dict.fromkeys(("name", "count", "nouns", "colors", "detect_quoted", "detect_tags"), 0.1),
}  # fmt: skip
PARAMS = {
    "seed": 3,
    "sprites": str(SPRITES),
    "tower": {"lr": 0.005, "phases": {"few": {"steps": 2, "samples_per_step": 4}}},
    "phases": {"few": PHASE},
    "dev": {"every_steps": 1, "batch_images": 8, "bootstrap_resamples": 20, "prompts": PROMPTS},
    "train": {
        "pack_tokens": 320, "lr": 0.002, "warmup_steps": 1, "decay_fraction": 0.25,
        "weights": {"desc": 3.0, "localiser": 0.5, "localiser_sigma": 10.0},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scenes of one phase, and of dev."""
    folder = tmp_path_factory.mktemp("base")
    write_coco_folder(folder / "data" / "few", SCENES, seed=3, workers=1, unwritten=0.5)
    write_coco_folder(folder / "data" / "dev", SCENES.model_copy(update={"val_images": 2}), seed=4, workers=1)
    return folder


@pytest.fixture(scope="module")
def store(home: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    path = tmp_path_factory.mktemp("samples") / "few.parquet"
    prepare_base_samples(home / "data" / "few", path, new_tokenizer(), tiny_pixels(), PHASE | {"draws": 40}, seed=3)
    return SampleStore(path)


def test_each_scene_gives_several_samples_with_different_prompts(store: SampleStore) -> None:
    assert len(store) == 40 * SCENES.train_images
    assert len({(s.image, s.prompt_ids.tobytes()) for s in store}) > 10 * SCENES.train_images
    assert len({s.image for s in store}) > SCENES.train_images  # flipped ones


def test_prompts_and_answers_contain_no_held_out_label(store: SampleStore) -> None:
    tokenizer = new_tokenizer()
    held_out = {label.name for tier, labels in catalog().tiers.items() if tier != "train" for label in labels}
    pairs = re.compile(rf"\b(?:{'|'.join(catalog().colors)}) \w+")
    written: set[str] = set()
    for sample in store:
        written.update(pairs.findall(tokenizer.decode([*sample.prompt_ids.tolist(), *sample.answer_ids.tolist()])))
    assert len(written) > 20
    assert not written & held_out


def test_labels_unseen_in_text_are_rendered_and_prompted_by_one_word(home: Path, store: SampleStore) -> None:
    instances = json.loads((home / "data" / "few" / "annotations" / "instances_train.json").read_text())
    tier = {row["id"]: row["supercategory"] for row in instances["categories"]}
    shown = {a["image_id"] for a in instances["annotations"] if tier[a["category_id"]] == "phrase"}
    images = {f"train/{row['file_name']}" for row in instances["images"] if row["id"] in shown}
    assert images
    factor = [s for s in store if s.image.split("#")[0] in images]
    assert factor
    assert all(" " not in desc for s in factor for desc in s.descs)


def test_the_localizer_reads_each_coordinate_from_its_first_digit(store: SampleStore) -> None:
    boxes = 0
    for sample in store:
        segment = digit_segment(sample)
        if not len(segment.box_tokens):
            continue  # asked for names, for a number, or for what is not there
        boxes += len(segment.box_tokens)
        assert segment.box_tokens.shape == segment.box_targets.shape == (len(sample.descs), 4)
        first = segment.box_tokens.ravel()
        assert (sample.answer_roles[first] == Role.NUMBER).all()
        assert (sample.answer_roles[first - 1] != Role.NUMBER).all()
        assert (np.abs(segment.box_targets - 1000 * sample.boxes_xyxy_px / np.array(
            [sample.width, sample.height] * 2)) <= 1).all()  # fmt: skip
    assert boxes > 100


def test_pretraining_writes_a_digits_checkpoint_and_resumes(home: Path, tmp_path: Path) -> None:
    counted = pretrain(home, tmp_path / "state", PARAMS)
    checkpoint = load_checkpoint(home / "checkpoint")
    assert checkpoint.coord is None  # no coordinate token yet
    metrics = json.loads((home / "metrics.json").read_text())
    assert metrics["steps"] == counted["steps"] == 2
    assert 0 <= metrics["dev"]["vocabulary.refused_easy"] <= 1
    assert counted["tower_steps"] == 2
    assert {"accuracy/patch_color", "accuracy/patch_noun"} <= set(metrics)
    curve = pd.read_csv(home / "checkpoint" / "learning_curve.tsv", sep="\t")
    assert curve["step"].tolist() == [1, 2]
    assert {"vocabulary.list_strict_AP50", "vocabulary_blind.list_strict_AP50"} <= set(curve)
    weights = (home / "checkpoint" / "model.safetensors").read_bytes()
    pretrain(home, tmp_path / "state", PARAMS)  # all steps are done: nothing is trained again
    assert (home / "checkpoint" / "model.safetensors").read_bytes() == weights


def test_an_unknown_tower_phase_is_rejected(home: Path, tmp_path: Path) -> None:
    wrong = PARAMS | {"tower": {"lr": 0.005, "phases": {"gone": {"steps": 1, "samples_per_step": 1}}}}
    with pytest.raises(ConfigError, match="gone"):
        pretrain(home, tmp_path, wrong)


def test_the_learning_rate_decays_at_the_end_of_a_phase_with_settle() -> None:
    phases = {
        name: {"steps": n, "settle": settles} for name, n, settles in (("a", 3, False), ("b", 4, True), ("c", 5, False))
    }
    assert segment_steps(phases) == [7, 5]
