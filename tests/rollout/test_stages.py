"""Decoding as runs: the files they leave, and when predictions are taken from the cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coordexp.packing.samples import SampleStore
from coordexp.records.gt_vs_pred import ImageResult, ParseReport, read_results
from coordexp.rollout import stages
from coordexp.rollout.engine import DecodeRequest, Generation
from coordexp.rollout.records import Rollout, read_rollouts
from coordexp.rollout.rescore import Rescored
from coordexp.rollout.stages import (
    decode_request,
    decode_val,
    rollout_summary,
    run_rollouts,
    warn_of_unusable,
)
from helpers import Workspace, answer_reader, new_checkpoint, new_tokenizer, save_model, teacher_rollouts
from toyworld.model import build_tiny


def decode(space: Workspace, name: str = "stage1", folder: Path | None = None) -> bool:
    """Decode a checkpoint; True if it was not in the cache."""
    return decode_val(space, name, folder or space.paths.run("stage1"))


def results(space: Workspace, name: str = "stage1"):
    return list(read_results(space.paths.evaluation(name) / "gt_vs_pred.jsonl"))


@pytest.fixture
def short(workspace: Workspace) -> Workspace:
    return workspace.set(decode__max_new_tokens=4)


def test_a_request_holds_the_block_and_the_names_of_the_data_set(workspace):
    workspace.paths.records.mkdir(parents=True)
    rows = [{"id": 1, "name": "cat", "split": "train"}]
    (workspace.paths.records / "categories.json").write_text(json.dumps(rows))
    space = workspace.set(decode__temperature=0.7, seed=5)
    free, closed = (decode_request(s, "json") for s in (space, space.set(decode__grammar="closed")))
    assert free == DecodeRequest(params=space.params.decode, codec="json", seed=5)
    assert closed.names == ("cat",)
    digits = decode_request(space, "digits").params
    assert (digits.box, digits.score) == ("argmax", "coord_logprob")


def test_the_readout_is_no_part_of_what_generation_depends_on(workspace):
    request = decode_request(workspace, "json")
    for changes in ({"decode__box": "argmax"}, {"decode__score": "mix"}, {"decode__box_top_k": 3}):
        assert decode_request(workspace.set(**changes), "json").identity() == request.identity()
    shorter = decode_request(workspace.set(decode__max_new_tokens=9), "json")
    assert shorter.identity() != request.identity()


def test_rollouts_of_a_run(short, monkeypatch):
    """The engine answers with the truth of the even images and with nothing parseable for the others."""

    def generate(self, samples, request):
        return [Generation(s.answer_ids if s.image_id % 2 == 0 else s.answer_ids[-1:], "stop") for s in samples]

    monkeypatch.setattr(stages.HfEngine, "generate", generate)
    summary = run_rollouts(short)
    out = short.paths.run("rollout")
    rollouts = read_rollouts(out / "rollouts.jsonl")
    samples = {s.image_id: s for s in SampleStore(short.paths.norm1000 / "train.parquet")}
    assert rollouts.keys() == samples.keys()
    lines = {r.image_id: r for r in read_results(out / "gt_vs_pred.jsonl")}
    for image_id, rollout in rollouts.items():
        n_true = len(samples[image_id].descs) - sum(samples[image_id].iscrowd)
        expected = n_true if image_id % 2 == 0 else 0
        assert len(rollout.pairs) == len(rollout.objects) == len(lines[image_id].pred) == expected
        assert rollout.usable == lines[image_id].parse.ok == (image_id % 2 == 0)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["precision"] == 1
    assert summary["recall"] == pytest.approx(summary["n_matched"] / summary["n_gt"], abs=5e-5)
    assert summary["n_matched"] == sum(len(r.pairs) for r in rollouts.values()) > 0
    assert (summary["unusable"], summary["parse_rate"]) == (3, 0.5)


def test_fewer_rollouts_than_samples(short):
    tree = short.profile.model_dump()
    tree["rollout"] |= {"images": 2}
    assert run_rollouts(replace(short, profile=type(short.profile).model_validate(tree)))["images"] == 2
    chosen = read_rollouts(short.paths.run("rollout") / "rollouts.jsonl")
    assert len(chosen) == 2
    assert all(len(r.ids) <= 4 for r in chosen.values())


def test_summary_counts_by_hand(world):
    checkpoint = new_checkpoint()
    rollouts = teacher_rollouts(checkpoint, world)
    reader = answer_reader(checkpoint)
    lines = [
        reader.result(
            s, Generation(np.array(rollouts[s.image_id].ids, np.int32), "stop"), Rescored(np.zeros(500), None), ""
        )
        for s in world.samples
    ]
    summary = rollout_summary(world.samples, list(rollouts.values()), lines)
    n_true = [len(s.descs) - sum(s.iscrowd) for s in world.samples]
    # One object of each image is missed, one predicted twice; the last image's answer does not parse.
    assert summary["n_gt"] == sum(n_true)
    assert summary["n_matched"] == sum(max(n - 1, 0) for n in n_true[:-1])
    assert summary["n_pred"] == sum(n for n, s in zip(n_true[:-1], world.samples, strict=False) if n > 1)
    assert summary["f1"] == pytest.approx(2 * summary["n_matched"] / (summary["n_pred"] + summary["n_gt"]), abs=5e-5)
    assert summary["unusable"] == 1


def test_a_summary_without_objects_is_undefined(world, caplog):
    samples = [replace(s, iscrowd=(True,) * len(s.iscrowd)) for s in world.samples]
    rollouts = [Rollout(s.image_id, (1,), "length", True, (), (), ()) for s in samples]
    cut = ParseReport(True, 0, truncated=True)
    lines = [ImageResult(s.image_id, s.image, s.width, s.height, (), (), "", cut, "length", 1) for s in samples]
    summary = rollout_summary(samples, rollouts, lines)
    assert [summary[key] for key in ("precision", "recall", "f1", "matched_iou_mean")] == [None] * 4
    warn_of_unusable(summary)
    assert f"{len(samples)} of {len(samples)} rollouts are cut at the token budget" in caplog.text


def test_a_second_decode_comes_from_the_cache(short, monkeypatch):
    assert decode(short)
    first = results(short)
    assert len(first) == 6
    assert all(line.n_generated_tokens <= 4 for line in first)
    shutil.rmtree(short.paths.evaluation("stage1"))
    monkeypatch.setattr(stages, "generate_answers", lambda *_: pytest.fail("decoded again"))
    assert not decode(short)
    assert results(short) == first
    # What only training and matching read does not decode again; that is what makes an A/B run cheap.
    assert not decode(short.set(softce_weight=0.2, stage2__b_ratio=0.9, matching__gate_threshold=0.9))


@pytest.mark.parametrize("change", [{"decode__max_new_tokens": 5}, {"decode__repetition_penalty": 1.1}, {"seed": 3}])
def test_what_shapes_the_answer_decodes_again(short, change):
    assert decode(short)
    assert decode(short.set(**change))
    assert not decode(short)


def test_other_weights_decode_again(short):
    assert decode(short)
    before = results(short)[0].identity
    weights = short.paths.run("stage1") / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(sorted(tensors)))
    save_file(tensors | {name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    assert decode(short)
    after = results(short)[0].identity
    assert before["model"] != after["model"]
    assert {k: v for k, v in before.items() if k != "model"} == {k: v for k, v in after.items() if k != "model"}


def test_a_decode_that_was_cut_starts_over(short, monkeypatch):
    def crash(*_):
        raise RuntimeError("power cut")

    with monkeypatch.context() as broken:
        broken.setattr(stages, "write_results", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            decode(short)
    assert not (short.paths.evaluation("stage1") / "gt_vs_pred.jsonl").exists()
    assert decode(short)
    assert len(results(short)) == 6


def test_a_model_without_coordinate_tokens_is_read_as_digits(short):
    """Its prompt is written by its own tokenizer."""
    tokenizer = new_tokenizer()
    folder = short.paths.root / "base"
    save_model(folder, build_tiny(tokenizer, 3), tokenizer)
    assert decode(short, "base", folder)
    summary = json.loads((short.paths.evaluation("base") / "decode.json").read_text())
    assert (summary["codec"], summary["images"], summary["checkpoint"]) == ("digits", 6, "base")
    decode(short)
    assert json.loads((short.paths.evaluation("stage1") / "decode.json").read_text())["codec"] == "json"
    base, stage1 = results(short, "base")[0].identity, results(short)[0].identity
    assert base["decode"] != stage1["decode"]
