"""`coordexp doctor`: all problems in one pass, whether they stop a run, and the needs of a run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from coordexp import cli
from coordexp.config.loading import load_params, read_yaml
from coordexp.config.run import RunConfig
from coordexp.doctor.needs import count_parameters, needs_of
from coordexp.doctor.records import examine
from coordexp.errors import CheckpointError
from coordexp.models.expand import add_coordinate_tokens
from coordexp.models.loading import load_checkpoint
from coordexp.packing.prepare import SamplePreparer
from coordexp.records.schema import ObjectRecord, Record
from coordexp.text.codecs import get_codec
from records_folders import annotation, coco_set, edit, picture, records_config, write_split


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    write_split(root, "train2017", 100, 12)
    write_split(root, "val2017", 500, 6)
    return root


def found(examination) -> dict[tuple[str, str], tuple[int, bool]]:
    return {(f.split, f.reason): (f.count, f.stops) for f in examination.findings}


def test_good_data_have_no_findings(coco):
    result = examine({"coco": coco_set(coco)}, records_config(), decode=True, workers=2)
    assert (result.findings, result.stops) == ([], False)
    assert {split: len(records) for split, records in result.records.items()} == {"train": 12, "val": 6}


def spoil(coco: Path) -> None:
    train = coco / "train2017"
    (train / f"{100:012d}.jpg").unlink()
    picture(503).save(train / f"{104:012d}.jpg")
    picture(503).save(coco / "val2017" / f"{503:012d}.jpg")
    (coco / "val2017" / f"{501:012d}.jpg").write_bytes(b"no image")
    edit(
        coco, "train2017", annotations=lambda old: [*old, annotation(1, 101, 99), annotation(2, 101, 1, [0, 0, -3, 4])]
    )


def test_every_fault_is_found_in_one_pass(coco, tmp_path):
    spoil(coco)
    sets = {
        "coco": coco_set(coco),
        "gone": coco_set(tmp_path / "gone"),
        "pickled": coco_set(coco, format="refcoco", train="refs(unc).p", val="none"),
    }
    result = examine(sets, records_config(), decode=True, workers=2)
    assert found(result) == {
        ("train", "bbox_too_thin"): (1, False),
        ("train", "image_missing"): (1, True),
        ("train", "unknown_category"): (1, False),
        ("val", "image_unreadable"): (1, True),
        ("all", "root_missing"): (1, True),
        ("train", "annotations_unusable"): (1, True),
        ("train", "train_image_in_val"): (1, True),
    }
    lenient = examine({"coco": coco_set(coco)}, records_config(bad_images="drop", overlap="drop_train"), True, 2)
    assert not lenient.stops


def test_a_dev_split_that_takes_everything_is_a_finding(coco):
    result = examine({"coco": coco_set(coco)}, records_config(dev_images=12), decode=False, workers=1)
    assert found(result) == {("train", "no_image_left_beside_dev"): (1, True)}


def test_parameters_are_counted_without_loading_them(repository):
    folder = repository / "models" / "tiny-base"
    checkpoint = load_checkpoint(folder)
    assert count_parameters(folder) == sum(p.numel() for p in checkpoint.model.parameters())


def smoke(repository: Path, codec: str = "json", **launch: object) -> RunConfig:
    """The smoke profile (64 x 64 to 96 x 96 px), with this codec and these launch settings."""
    run = RunConfig.read(repository / "params.yaml", "smoke")
    text = run.params.text.model_copy(update={"codec": codec})
    profile = run.profile.model_copy(update={"launch": run.profile.launch.model_copy(update=launch)})
    return replace(run, params=run.params.model_copy(update={"text": text}), profile=profile)


def test_needs_by_hand(repository, monkeypatch):
    monkeypatch.chdir(repository)
    run = smoke(repository)
    image = load_checkpoint(repository / "models" / "tiny-base").pixels
    record = Record("a.jpg", 96, 64, (ObjectRecord("cat", (0, 0, 9, 9)),))
    needs = needs_of(run, [record] * 10)
    assert needs.image_tokens == 10 * (96 // image.factor) * (64 // image.factor)
    assert needs.text_tokens == 10 * (14 + 5 + 1 + 9)  # 4 coordinates and 5 scaffold pieces of one token each
    assert needs.longest_tokens == (needs.image_tokens + needs.text_tokens) / 10
    assert needs.packs == -(-(needs.image_tokens + needs.text_tokens) // run.profile.packing.pack_tokens)
    assert needs.over_pack == 0
    assert (needs.longest_answer, needs.over_budget) == (1 + 9, 0)
    decode = run.params.decode.model_copy(update={"max_new_tokens": 9})
    tight = replace(run, params=run.params.model_copy(update={"decode": decode}))
    assert needs_of(tight, [record] * 10).over_budget == 10
    assert needs_of(smoke(repository, "tags"), [record] * 10).text_tokens < needs.text_tokens
    assert needs_of(smoke(repository, processes=0), [record] * 10) == needs  # their number is not known here
    spread = needs_of(smoke(repository, processes=4, sharding="fsdp2", rows_per_forward=1), [record] * 10).memory
    assert spread.moments == needs.memory.moments // 4


@pytest.mark.parametrize("codec", ["json", "tags"])
def test_the_longest_record_is_as_long_as_its_sample(repository, monkeypatch, codec):
    monkeypatch.chdir(repository)
    run = smoke(repository, codec)
    limits = run.profile.model.min_pixels, run.profile.model.max_pixels
    base = load_checkpoint(repository / "models" / "tiny-base", *limits)
    add_coordinate_tokens(base.model, base.tokenizer, "mean", 0)
    preparer = SamplePreparer(base.tokenizer, get_codec(codec), base.pixels)
    # Names of several tokens in this tokenizer, in the answer and in the prompt.
    names = ("fire hydrant", "wine glass", "toothbrush", "Köttbullar", "人")
    objects = tuple(ObjectRecord(names[i % 5], (i, i, i + 9, i + 9)) for i in range(20))
    asked = {"prompt": {"kind": "listed", "style": 1, "names": [*names[:2], "refrigerator", "surfboard"]}}
    for record in (Record("a.jpg", 96, 64, objects), Record("a.jpg", 96, 64, objects, metadata=asked)):
        needs = needs_of(run, [record])
        assert needs.longest_tokens == pytest.approx(preparer.prepare(record).length, abs=5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "incomplete or damaged"),
    ],
)
def test_a_model_that_cannot_be_read_stops_a_run(repository, tmp_path, damage, message):
    folder = tmp_path / "base"
    shutil.copytree(repository / "models" / "tiny-base", folder)
    damage(folder)
    run = smoke(repository)
    model = run.profile.model.model_copy(update={"path": str(folder)})
    with pytest.raises(CheckpointError, match=message):
        needs_of(replace(run, profile=run.profile.model_copy(update={"model": model})), [Record("a.jpg", 96, 64, ())])


def write_profile(repository: Path, coco: Path, folder: Path) -> Path:
    profile = read_yaml(repository / "configs" / "smoke.yaml")
    profile["source"] = {"kind": "datasets", "verify": "decode", "sets": {"coco": coco_set(coco).model_dump()}}
    profile["model"]["path"] = str(repository / "models" / "tiny-base")
    (folder / "configs").mkdir()
    YAML().dump(profile, folder / "configs" / "mine.yaml")
    YAML().dump(read_yaml(repository / "params.yaml") | {"profile": "mine"}, folder / "params.yaml")
    return folder / "params.yaml"


def test_the_command_reports_what_would_happen(repository, coco, tmp_path, capfd):
    params = write_profile(repository, coco, tmp_path)
    assert load_params(params).profile == "mine"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--params", str(params)])
    assert not stopped.value.code
    out = capfd.readouterr().out
    assert "train: 12 records, 24 objects" in out
    assert "no fault found" in out
    assert "nothing here would stop a run" in out
    spoil(coco)
    listing = tmp_path / "faults" / "all.jsonl"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--params", str(params), "--out", str(listing)])
    assert stopped.value.code == 2
    out = capfd.readouterr().out
    assert "STOP: coco/train: image_missing: 1\n" in out
    assert "dropped: coco/train: unknown_category: 1\n" in out
    assert "annotation 1: unknown_category" in out
    problems = [json.loads(line) for line in listing.read_text().splitlines()]
    assert {"reason", "file", "key", "detail"} == set(problems[0])
    stops = re.findall(r"^STOP: (?:\S+: )?(\w+): \d+$", out, flags=re.MULTILINE)
    assert set(stops) <= {problem["reason"] for problem in problems}
    assert sorted(problem["reason"] for problem in problems) == [
        "bbox_too_thin", "image_missing", "image_unreadable", "train_image_in_val", "unknown_category",
    ]  # fmt: skip


def test_problems_of_the_whole_run_are_written_too(repository, coco, tmp_path, capfd):
    """A set without its folder, and records longer than a pack: neither is a problem of a single annotation."""
    params = write_profile(repository, coco, tmp_path)
    file = tmp_path / "configs" / "mine.yaml"
    profile = read_yaml(file)
    profile["source"]["sets"]["gone"] = coco_set(tmp_path / "gone").model_dump()
    profile["packing"]["pack_tokens"] = 32
    YAML().dump(profile, file)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--params", str(params), "--out", str(tmp_path / "all.jsonl")])
    assert stopped.value.code == 2
    faults = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    stops = re.findall(r"^STOP", capfd.readouterr().out, flags=re.MULTILINE)
    assert [fault["reason"] for fault in faults] == ["root_missing", "needs"]
    assert len(stops) == len(faults)
    assert "longer than a pack" in faults[1]["detail"]


def test_composed_scenes_need_no_check(repository, capfd, monkeypatch):
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--profile", "smoke"])
    assert not stopped.value.code
    assert "the raw stage composes the scenes" in capfd.readouterr().out
