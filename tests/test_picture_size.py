"""A checkpoint defines its use: trained with non-default limits and codec, it is read in the same way everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import norm1000, pack, rollout, stage1, stage1_control, stage2
from ruamel.yaml import YAML
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from coordexp import cli, detector
from coordexp.config.loading import load_params, load_profile, read_yaml
from coordexp.config.paths import ProfilePaths, model_folder
from coordexp.config.run import RunConfig
from coordexp.detector import Detector
from coordexp.errors import CheckpointError, DamagedArtefactError
from coordexp.infra.artefacts import HASHES
from coordexp.models.loading import load_format
from coordexp.models.processor import IMAGE_FILE, PROCESSOR_FILE
from coordexp.packing.samples import Sample
from coordexp.records.schema import ObjectRecord, Record, write_records
from coordexp.rollout import stages
from coordexp.rollout.scoring import read_decoded, scored
from coordexp.rollout.stages import decode_split
from coordexp.stage import stage_main
from coordexp.text.prompts import TASKS
from coordexp.text.vocabulary import CoordVocabulary

LIMITS = (150 * 150, 180 * 180)  # different from those of any profile and of the base model
SHOWN = (160, 160)  # an image of 120 x 120 px under them
BUDGET = 40
STEPS = 30
PARAMS = {
    "text": {"codec": "tags", "object_order": "random"},
    "decode": {"max_new_tokens": BUDGET, "box": "median", "score": "quality"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> RunConfig:
    """A profile with these limits and this codec, trained by the stages until stage 1 has memorized its image."""
    root = tmp_path_factory.mktemp("sizes")
    profile = read_yaml(repository / "configs" / "smoke.yaml")
    profile["model"] |= {"min_pixels": LIMITS[0], "max_pixels": LIMITS[1], "path": str(repository / "models/tiny-base")}
    profile["stage1"] |= {"steps": STEPS, "warmup_steps": 5, "packs_per_step": 1}
    profile["stage2"] |= {"steps": 2, "warmup_steps": 1}
    profile["monitor"]["every_steps"] = 0
    params = read_yaml(repository / "params.yaml") | {"profile": "smoke"}
    for block, changes in PARAMS.items():
        params[block] |= changes
    (root / "configs").mkdir()
    YAML().dump(profile, root / "configs" / "smoke.yaml")
    YAML().dump(params, root / "params.yaml")
    paths = ProfilePaths("smoke", root)
    for folder in (paths.raw, paths.records):
        folder.mkdir(parents=True)
    Image.fromarray(picture()).save(paths.raw / "a.png")
    for split in ("train", "dev", "val"):
        objects = (ObjectRecord("cat", (10, 10, 90, 90)), ObjectRecord("dog", (40, 30, 110, 80)))
        write_records(paths.records / f"{split}.jsonl", [Record("a.png", 120, 120, objects)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        for stage in (norm1000, pack, stage1, rollout, stage2, stage1_control):
            options = ["--profile", "smoke", "--params", str(root / "params.yaml"), "--out", str(root)]
            assert stage_main(stage.run, options) == 0
    chosen = load_profile(root / "configs" / "smoke.yaml")
    return RunConfig(params=load_params(root / "params.yaml"), profile=chosen, paths=paths)


@pytest.fixture
def trained(run: RunConfig) -> Path:
    """Stage 1's checkpoint."""
    return run.paths.run("stage1")


def picture() -> np.ndarray:
    """120 x 120 px of noise: any other size of it is another image."""
    return np.random.default_rng(5).integers(0, 255, (120, 120, 3), np.uint8)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """The prompt of the detector."""
    asked: list[Sample] = []
    read = detector.read_answers

    def read_answers(form: Any, reader: Any, samples: list[Sample], *rest: Any) -> Any:
        asked.extend(samples)
        return read(form, reader, samples, *rest)

    monkeypatch.setattr(detector, "read_answers", read_answers)
    return asked


def test_every_stage_writes_the_image_format_and_codec_of_its_model(run: RunConfig) -> None:
    folders = [run.paths.init, *(run.paths.run(name) for name in ("stage1", "stage1-control", "stage2"))]
    for form in map(load_format, folders):
        assert (form.pixels.min_pixels, form.pixels.max_pixels) == LIMITS
        said = form.detection
        assert (said.codec, said.object_order, said.prompts, said.names) == ("tags", "random", ("open",), ())
        assert said.coordinates == CoordVocabulary.from_tokenizer(form.tokenizer)


def test_detector_predict_and_evaluation_give_the_same_boxes(
    run: RunConfig,
    trained: Path,
    asked: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(run.paths.root))
    found = Detector.from_checkpoint(trained, max_new_tokens=BUDGET).predict(picture())
    assert [(sample.resized_width, sample.resized_height) for sample in asked] == [SHOWN]
    assert len(found) >= 1, found.raw_text
    with pytest.raises(SystemExit):
        cli.main(["predict", str(run.paths.raw / "a.png"), "--checkpoint", str(trained), "--json"])
    (told,) = map(json.loads, capsys.readouterr().out.splitlines()[-1:])
    assert told["raw_text"] == found.raw_text
    assert told["objects"] == found.to_json()["objects"]
    decode_split(run, "stage1", trained, run.paths.decoded("stage1"))
    (judged,) = (scored(answer, run.params.decode) for answer in read_decoded(run.paths.decoded("stage1")))
    assert (judged.raw_text, [p.desc for p in judged.pred]) == (found.raw_text, list(found.descs))
    np.testing.assert_allclose([p.bbox_xyxy_px for p in judged.pred], found.boxes_xyxy_px, atol=1e-4)
    np.testing.assert_allclose([p.score for p in judged.pred], found.scores, atol=1e-6)


def test_the_base_model_gets_images_in_the_size_of_the_profile(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(run.paths.root))
    given: list[Any] = []
    generate = stages.generate_answers
    monkeypatch.setattr(stages, "generate_answers", lambda *a: given.append(a[1]) or generate(*a))
    decode_split(run, "base", model_folder(run.profile.model.path), run.paths.decoded("base"))
    (form,) = given
    assert (form.codec, form.pixels.min_pixels, form.pixels.max_pixels) == ("digits", *LIMITS)


def test_plain_transformers_sees_the_same_pixels_and_gives_the_same_answer(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    images = AutoImageProcessor.from_pretrained(trained)(images=[Image.fromarray(picture())], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.float32)
    grid = images["image_grid_thw"][0].tolist()
    assert grid == [1, SHOWN[1] // 16, SHOWN[0] // 16]
    content = [{"type": "image"}, {"type": "text", "text": TASKS["detect"]}]
    words = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    words = words.replace("<|image_pad|>", "<|image_pad|>" * (grid[1] * grid[2] // 4))
    inputs = tokenizer(words, return_tensors="pt") | images
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, max_new_tokens=BUDGET, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    found = Detector.from_checkpoint(trained, max_new_tokens=BUDGET).predict(picture())
    assert tokenizer.decode(ids) == found.raw_text


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_a_checkpoint_with_an_edited_image_size_counts_as_damaged(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "edited")
    edit(tmp_path / "edited" / IMAGE_FILE, lambda tree: tree["size"].update(longest_edge=40_000))
    with pytest.raises(DamagedArtefactError, match=rf"{IMAGE_FILE}: sha256 .* but {HASHES} records"):
        load_format(tmp_path / "edited")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, f"no {IMAGE_FILE}, which sets the image size"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "are None and None pixels"),
        ('{"size": {"shortest_edge": 9, "longest_edge": 4}}', "are 9 and 4 pixels"),
        ('{"size": {"shortest_edge": "9", "longest_edge": 40}}', "are '9' and 40 pixels"),
        ('{"size": {"shortest_edge": true, "longest_edge": 40}}', "are True and 40 pixels"),
        ('{"size": {"height": 40, "width": 40}}', "are None and None pixels"),
        ('{"min_pixels": 1, "max_pixels": 9, "patch_size": 14}', "patch_size is 14, expected 16"),
        ('{"min_pixels": 1, "max_pixels": 9, "image_mean": [0.4, 0.4, 0.4]}', "image_mean is"),
    ],
)
def test_unsupported_processor_files_are_refused(
    trained: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    shutil.copytree(trained, tmp_path / "odd")
    for name in (HASHES, "run_metadata.json", IMAGE_FILE):
        (tmp_path / "odd" / name).unlink()
    if content is not None:
        (tmp_path / "odd" / IMAGE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_format(tmp_path / "odd")


def test_both_layouts_of_transformers_are_read(trained: Path, tmp_path: Path) -> None:
    expected = load_format(trained).pixels
    shutil.copytree(trained, tmp_path / "new")
    for name in (HASHES, "run_metadata.json"):
        (tmp_path / "new" / name).unlink()
    AutoImageProcessor.from_pretrained(trained).save_pretrained(tmp_path / "saved")
    block = json.loads((tmp_path / "saved" / IMAGE_FILE).read_text())
    (tmp_path / "new" / IMAGE_FILE).write_text(json.dumps(block))
    assert load_format(tmp_path / "new").pixels == expected
    (tmp_path / "new" / IMAGE_FILE).unlink()
    (tmp_path / "new" / PROCESSOR_FILE).write_text(json.dumps({"image_processor": block}))
    assert load_format(tmp_path / "new").pixels == expected
    old = {"min_pixels": LIMITS[0], "max_pixels": LIMITS[1]}
    (tmp_path / "new" / IMAGE_FILE).write_text(json.dumps(old))
    assert load_format(tmp_path / "new").pixels == expected
