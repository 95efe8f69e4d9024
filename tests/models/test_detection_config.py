"""coordexp.json records the prompts of training; invalid files are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from coordexp.config.schema import TextParams
from coordexp.errors import CheckpointError
from coordexp.infra.provenance import answer_files
from coordexp.models.detection_config import BASE, FILE, DetectionConfig
from coordexp.models.loading import load_checkpoint, load_format, save_checkpoint
from coordexp.records.schema import Record
from coordexp.text.vocabulary import CoordVocabulary
from helpers import new_checkpoint, new_tokenizer, save_model

TEXT = TextParams(codec="tags", object_order="random")


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint(codec="tags")


@pytest.fixture
def folder(tmp_path, checkpoint):
    save_checkpoint(tmp_path, checkpoint)
    return tmp_path


def taught(*prompts: dict[str, Any] | None) -> DetectionConfig:
    records = [Record("a.png", 9, 9, (), metadata={"prompt": p} if p else {}) for p in prompts]
    return DetectionConfig.of_training(TEXT, records, CoordVocabulary(7))


@pytest.mark.parametrize(
    ("prompts", "kinds", "names", "asked"),
    [
        ([None], ("open",), (), None),
        ([{"kind": "open", "style": 2}, {"kind": "phrase", "names": ["a cat"]}], ("open", "phrase"), (), None),
        ([{"kind": "phrase", "names": ["a cat"]}], ("phrase",), (), None),
        ([{"kind": "closed", "names": ["dog", "cat"]}] * 2, ("closed",), ("dog", "cat"), "closed"),
        (
            [{"kind": "listed", "names": ["dog"]}, {"kind": "listed", "names": ["cat"]}],
            ("listed",),
            ("cat", "dog"),
            "listed",
        ),
        ([None, {"kind": "listed", "names": ["dog"]}], ("listed", "open"), ("dog",), None),
        ([{"kind": "closed", "names": [str(i) for i in range(300)]}], ("closed",), None, None),
    ],
)
def test_it_records_the_prompts_of_the_training_records(prompts, kinds, names, asked):
    config = taught(*prompts)
    assert (config.codec, config.object_order, config.prompts) == ("tags", "random", kinds)
    assert names in (None, config.names)
    assert config.prompt == (asked and {"kind": asked, "names": list(names)})


def test_what_was_saved_is_loaded(checkpoint, tmp_path):
    config = taught({"kind": "closed", "names": ["Köttbullar", "人"]}).model_copy(
        update={"coordinates": checkpoint.coord}
    )
    save_checkpoint(tmp_path, replace(checkpoint, detection=config))
    assert load_format(tmp_path).detection == config
    assert FILE in {path.name for path in answer_files(tmp_path)}


def test_a_base_model_has_no_file(tmp_path):
    tokenizer = new_tokenizer()
    save_model(tmp_path, new_checkpoint().model, tokenizer)
    assert not (tmp_path / FILE).exists()
    assert load_format(tmp_path).detection == BASE
    (tmp_path / FILE).write_text(json.dumps({"version": 1, "codec": "json", "object_order": "top_left"}))
    with pytest.raises(CheckpointError, match="codec is 'json', which needs coordinate tokens"):
        load_format(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "missing, although the tokenizer has coordinate tokens"),
        ("{", "not valid JSON|not UTF-8"),
        ("[" * 100_000, "not valid JSON|not UTF-8"),
        (b"\xff", "not valid JSON|not UTF-8"),
        ("[]", "holds .* not a JSON object"),
        ({"version": 2, "later": True}, "version is 2 .*expected 1.*newer version of coordexp"),
        ({"codec": "xml"}, "codec is 'xml'"),
        ({"prompts": ["all"]}, r"prompts\[0\] is 'all'"),
        ({"names": [1]}, r"names\[0\] is 1"),
        ({"box": "mode"}, "box is 'mode'"),
        ({"colour": 1}, "colour is 1"),
        ({"coordinates": {"first_id": 3, "count": 1000}}, r"coordinates are .*first_id=3.* those of the tokenizer"),
        ({"coordinates": {"first_id": 3, "count": 99}}, r"coordinates\.count is 99"),
        ({"coordinates": None}, "coordinates are None"),
    ],
)
def test_invalid_files_are_refused(folder, change, message):
    path = folder / FILE
    if change is None:
        path.unlink()
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(CheckpointError, match=f"{FILE}: .*{message}"):
        load_format(folder)


def test_a_file_without_a_version_is_refused(folder):
    config = json.loads((folder / FILE).read_text())
    del config["version"]
    (folder / FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{FILE}: version is missing"):
        load_format(folder)


def test_generation_settings_of_a_folder_do_not_change_answers(folder):
    wanted = {"num_beams": 3, "no_repeat_ngram_size": 3, "max_time": 0.01, "do_sample": True, "temperature": 2.0}
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wanted))
    kept = load_checkpoint(folder).model.generation_config.to_diff_dict()
    assert kept.keys() - {"transformers_version"} == {"eos_token_id", "pad_token_id"}
