"""Validation of checkpoint folders: generated damage to a file gives a CheckpointError or has no effect."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from pathlib import Path

import pytest

from coordexp.errors import CheckpointError
from coordexp.models.loading import ModelFormat, load_checkpoint, load_format, save_checkpoint
from helpers import new_checkpoint
from mutations import broken

WEIGHTS = "model.safetensors"
CHANGED = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    *("preprocessor_config.json", "coordexp.json", WEIGHTS, "model.safetensors.index.json"),
)
# Well-formed changes of these keys are accepted.
MEANT = ("coordexp.json", "preprocessor_config.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_checkpoint(folder, new_checkpoint())
    return folder


def linked(whole: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def put(folder: Path, name: str, content: bytes) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


def header(whole: Path) -> tuple[dict, bytes]:
    content = (whole / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def content_of(whole: Path, name: str) -> object:
    if name == "model.safetensors.index.json":
        return {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(header(whole)[0].keys() - {"__metadata__"}, WEIGHTS),
        }
    return json.loads((whole / name).read_text())


def write_damaged(whole: Path, folder: Path, name: str, rng: random.Random) -> None:
    if name == WEIGHTS:
        names, data = header(whole)
        text = broken(names, rng)
        put(folder, name, struct.pack("<Q", len(text)) + text + data[: rng.randrange(len(data))])
    else:
        put(folder, name, broken(content_of(whole, name), rng))


def seen(form: ModelFormat) -> tuple[object, ...]:
    return form.pixels, form.detection, form.tokenizer.get_vocab()


@pytest.mark.parametrize("numbers", [range(50), pytest.param(range(50, 200), marks=pytest.mark.thorough)], ids=str)
def test_generated_damage_is_an_error_or_has_no_effect(whole: Path, tmp_path: Path, numbers: range) -> None:
    accepted, messages, expected = 0, {}, seen(load_format(whole))
    for number in numbers:
        rng, name = random.Random(number), CHANGED[number % len(CHANGED)]
        folder = linked(whole, tmp_path / str(number))
        write_damaged(whole, folder, name, rng)
        try:
            found = seen(load_format(folder))
        except CheckpointError as error:
            messages[folder] = str(error)
            continue
        accepted += 1
        if name not in MEANT:
            assert found == expected, (number, name)
    assert accepted < len(numbers) / 3
    assert [m for folder, m in messages.items() if str(folder) not in m or len(m) > 2000] == []


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "text_config",
            {"num_hidden_layers": 10**6},
            "text_config.num_hidden_layers is 1,000,000, but the weights are",
        ),
        ("text_config", {"hidden_size": 10**9}, "but the weights are"),
        ("vision_config", {"num_position_embeddings": 10**9}, "but the weights are"),
        ("text_config", {"hidden_act": "nope"}, "the model cannot be built"),
        ("text_config", {"num_attention_heads": 0}, "num_attention_heads is 0 (an integer)"),
        ("vision_config", {"hidden_size": "128"}, "vision_config.hidden_size is '128' (text)"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused_before_the_model_is_built(
    whole: Path, tmp_path: Path, part: str, changes: dict[str, object], message: str
) -> None:
    folder = linked(whole, tmp_path / "folder")
    config = json.loads((whole / "config.json").read_text())
    put(folder, "config.json", json.dumps(config | {part: config[part] | changes}).encode())
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "coordexp.json"])
def test_only_regular_files_are_opened(whole: Path, tmp_path: Path, name: str) -> None:
    folder = linked(whole, tmp_path / "folder")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"named pipe|no config\.json|tokenizer"):
        load_format(folder)


def test_weights_outside_the_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = linked(whole, tmp_path / "folder")
    index = {"weight_map": dict.fromkeys(header(whole)[0].keys() - {"__metadata__"}, f"../whole/{WEIGHTS}")}
    put(folder, "model.safetensors.index.json", json.dumps(index).encode())
    with pytest.raises(CheckpointError, match="weight_map"):
        load_format(folder)
