"""Loading a checkpoint: every weight comes from the files, and an incomplete folder is refused by name."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coordexp.errors import CheckpointError, DamagedArtefactError
from coordexp.infra.artefacts import HASHES, sealing
from coordexp.models.forward import head_table, input_table
from coordexp.models.loading import load_checkpoint, save_checkpoint, vocabulary_size
from helpers import new_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    checkpoint = new_checkpoint()
    save_checkpoint(tmp_path, checkpoint)
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_checkpoint(folder)


def test_what_was_saved_is_loaded(folder):
    loaded, saved = load_checkpoint(folder).model.state_dict(), new_checkpoint().model.state_dict()
    assert loaded.keys() == saved.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=0, msg=name)


def test_the_vocabulary_size_is_the_number_of_table_rows(folder):
    loaded = load_checkpoint(folder)
    rows = vocabulary_size(folder)
    assert rows == len(input_table(loaded.model).weight) == len(head_table(loaded.model))
    assert rows >= len(loaded.tokenizer)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_without_a_checkpoint_is_refused(folder, name):
    (folder / name).unlink()
    refused(folder, f"{folder}: no {name}; expected a Hugging Face checkpoint folder")


@pytest.mark.parametrize("found", ["qwen2_vl", "bert", None])
def test_another_model_is_refused(folder, found):
    change_config(folder, model_type=found)
    refused(folder, f"config.json: model_type is {found!r}, expected 'qwen3_vl'")


def test_quantized_weights_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "config.json: quantization_config is {'quant_method': 'gptq'")


def test_the_attention_setting_of_the_folder_is_ignored(folder):
    change_config(folder, attn_implementation="someone/kernel", _attn_implementation="someone/kernel")
    assert load_checkpoint(folder).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"], ids=repr)
def test_a_damaged_config_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json: not ")


def test_weights_in_another_format_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, "no *.safetensors weights")


@pytest.mark.parametrize("kept", [0, 1000, -1000], ids=["empty", "cut in the header", "cut in the data"])
def test_damaged_weights_are_refused(folder, kept):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    refused(folder, f"{folder}: the safetensors weights are incomplete or damaged")


def test_a_missing_shard_is_refused(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = {f"weight_{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    refused(folder, "model-00002-of-00002.safetensors")


def test_a_missing_weight_is_an_error_with_its_name(folder):
    weights = load_file(folder / WEIGHTS)
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    refused(
        folder,
        f"not in the safetensors files or have another shape (1 in all, first {name})",
    )


def test_weights_of_another_shape_are_errors_with_their_name(folder):
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, text_config=config["text_config"] | {"intermediate_size": 64})
    refused(folder, "first model.language_model.layers.0.mlp.down_proj.weight)")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_changed_file_is_refused(folder, name):
    with sealing(folder):
        pass
    load_checkpoint(folder)
    content = (folder / name).read_bytes()
    # A byte of the weights, or in text files a space that changes only the hash.
    (folder / name).write_bytes(content[:-2] + b"x" + content[-1:] if name == WEIGHTS else content + b" ")
    with pytest.raises(DamagedArtefactError, match=rf"{name}: sha256 .*, but {HASHES} records .*coordexp verify"):
        load_checkpoint(folder)


def test_a_missing_recorded_file_is_refused(folder):
    with sealing(folder):
        pass
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DamagedArtefactError, match=r"tokenizer.json: no such file, but"):
        load_checkpoint(folder)


def test_an_added_file_that_would_affect_answers_is_refused(folder):
    with sealing(folder):
        pass
    (folder / "notes.txt").touch()
    load_checkpoint(folder)
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(DamagedArtefactError, match=r"added_tokens.json: not in the list"):
        load_checkpoint(folder)


def edit_tokenizer(folder: Path, edit) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    edit(content["added_tokens"])
    path.write_text(json.dumps(content))


def position(added: list[dict], token: str) -> int:
    return next(i for i, entry in enumerate(added) if entry["content"] == token)


def drop(added: list[dict]) -> None:
    del added[position(added, "<|coord_500|>")]


def swap(added: list[dict]) -> None:
    first, second = position(added, "<|coord_7|>"), position(added, "<|coord_8|>")
    added[first]["content"], added[second]["content"] = added[second]["content"], added[first]["content"]


def double(added: list[dict]) -> None:
    added.append(added[position(added, "<|coord_7|>")] | {"id": added[-1]["id"] + 1})


@pytest.mark.parametrize("edit", [drop, swap, double], ids=["lacking", "other order", "twice"])
def test_a_tokenizer_with_other_coordinate_tokens_is_refused(folder, edit):
    edit_tokenizer(folder, edit)
    with pytest.raises(CheckpointError, match=r"coord_\d+\|>|coordinate token ids"):
        load_checkpoint(folder)


def test_a_tokenizer_without_its_added_tokens_is_refused(folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "added_tokens"}))
    refused(folder, "tokenizer.json: added_tokens is missing")


def test_code_in_a_model_folder_is_not_run(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    change_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    with suppress(CheckpointError):  # refused or ignored, but not run
        load_checkpoint(folder)
    assert not ran.exists()
