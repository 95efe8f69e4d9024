"""The decoding stages: their files, which do not depend on the readout."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coordexp.errors import DataError
from coordexp.infra import resume
from coordexp.infra.artefacts import HASHES
from coordexp.models.loading import load_checkpoint
from coordexp.packing.samples import SampleStore
from coordexp.rollout import hf_engine, stages
from coordexp.rollout.engine import READOUT_KEYS, DecodeRequest, Generation
from coordexp.rollout.records import read_generations
from coordexp.rollout.scoring import DISTRIBUTIONS, Decoded, read_decoded, read_summary, scored
from coordexp.rollout.stages import (
    decode_kept,
    decode_request,
    decode_split,
    make_reader,
    predict_samples,
    run_rollouts,
)
from helpers import Workspace, new_tokenizer, save_model
from toyworld.model import build_tiny


def decode(space: Workspace, name: str = "stage1", folder: Path | None = None) -> dict[str, Any]:
    """Decode a checkpoint on val; returns the summary on file."""
    decode_split(space, name, folder or space.paths.run("stage1"), space.paths.decoded(name))
    return read_summary(space.paths.decoded(name))


def decoded(space: Workspace, name: str = "stage1") -> list[Decoded]:
    return list(read_decoded(space.paths.decoded(name)))


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


def test_generation_does_not_depend_on_the_readout(workspace):
    request = decode_request(workspace, "json")
    for changes in ({"decode__box": "argmax"}, {"decode__score": "mix"}, {"decode__box_top_k": 3}):
        assert decode_request(workspace.set(**changes), "json").identity() == request.identity()
    shorter = decode_request(workspace.set(decode__max_new_tokens=9), "json")
    assert shorter.identity() != request.identity()


def test_rollout_files_hold_the_generated_tokens(short, monkeypatch):
    """The engine answers with the truth of the even images and with nothing parseable for the others."""

    def generate(self, samples, request):
        return [Generation(s.answer_ids if s.image_id % 2 == 0 else s.answer_ids[-1:], "stop") for s in samples]

    monkeypatch.setattr(stages.HfEngine, "generate", generate)
    monkeypatch.setattr(stages, "rescore", lambda *_: pytest.fail("nobody reads scores of rollouts"))
    samples = {s.image_id: s for s in SampleStore(short.paths.norm1000 / "train.parquet")}
    assert run_rollouts(short) == len(samples)
    rollouts = read_generations(short.paths.rollouts, 10**6)
    assert rollouts.keys() == samples.keys()
    for image_id, generation in rollouts.items():
        truth = samples[image_id].answer_ids
        assert generation.ids.tolist() == (truth if image_id % 2 == 0 else truth[-1:]).tolist()
    before = short.paths.rollouts.read_bytes()
    run_rollouts(short.set(decode__score="mix", decode__box="argmax", matching__gate_threshold=0.9))
    assert short.paths.rollouts.read_bytes() == before


def test_fewer_rollouts_than_samples(short):
    tree = short.profile.model_dump()
    tree["rollout"] |= {"images": 2}
    assert run_rollouts(replace(short, profile=type(short.profile).model_validate(tree))) == 2
    chosen = read_generations(short.paths.rollouts, 10**6)
    assert len(chosen) == 2
    assert all(len(g.ids) <= 4 for g in chosen.values())


def test_decoding_stores_answers_that_any_readout_scores(workspace):
    """Read back from the files, as the evaluation does, every box and score is that of the answers in memory."""
    space = workspace.set(decode__grammar="any", decode__corners="valid", decode__max_new_tokens=120)
    checkpoint = load_checkpoint(space.paths.run("stage1"))
    store = SampleStore(space.paths.norm1000 / "val.parquet")
    summary, batch = decode(space), space.profile.rollout.batch_images
    assert (summary["images"], summary["codec"], summary["checkpoint"]) == (6, "json", "stage1")
    assert summary["settings"].keys().isdisjoint(READOUT_KEYS)
    for changes in ({}, {"decode__box": "argmax", "decode__score": "mix"}, {"decode__box": "top_k"}):
        changed = space.set(**changes)
        request, reader = decode_request(changed, "json"), make_reader(checkpoint)
        direct = [r for r, _ in predict_samples(checkpoint, reader, list(store), space.paths.raw, request, batch)]
        stored = [scored(answer, changed.params.decode) for answer in decoded(space)]
        assert [replace(r, identity={}) for r in stored] == direct
    assert sum(len(r.pred) for r in direct) > 0


def test_several_processes_write_the_same_bytes(short, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(short.paths.root))
    monkeypatch.setattr("coordexp.rollout.hf_engine.GROUP_BATCHES", 1)

    def written(processes: int) -> list[bytes]:
        tree = short.profile.model_dump()
        tree["launch"] |= {"processes": processes}
        tree["rollout"] |= {"batch_images": 2}
        space = replace(short, profile=type(short.profile).model_validate(tree))
        run_rollouts(space)
        decode(space)
        files = [short.paths.rollouts, *short.paths.decoded("stage1").iterdir()]
        return [file.read_bytes() for file in sorted(files)]

    alone, together = written(1), written(2)
    assert len(alone) == 5
    assert together == alone
    assert not list(short.paths.root.rglob("generations*.jsonl"))


def test_a_second_run_of_the_same_work_waits_and_shares_the_answers(short, monkeypatch):
    """The second begins while the first answers; it finds all of them, and nothing stays behind."""
    monkeypatch.setenv("DVC_ROOT", str(short.paths.root))
    monkeypatch.setattr(resume, "POLL_S", 0.01)
    begun, answered, original = threading.Event(), [], hf_engine.answer_group

    def answer_group(*arguments):
        answered.append(arguments[1])
        begun.set()
        while len(answered) == 1 and not list(short.paths.root.glob(f".resume/*/{resume.WAITING}")):
            time.sleep(0.01)
        return original(*arguments)

    monkeypatch.setattr(hf_engine, "answer_group", answer_group)
    outs = [short.paths.root / name for name in ("one", "two")]
    with ThreadPoolExecutor(2) as both:
        first = both.submit(decode_split, short, "stage1", short.paths.run("stage1"), outs[0])
        assert begun.wait(60)
        second = both.submit(decode_split, short, "stage1", short.paths.run("stage1"), outs[1])
        first.result()
        second.result()
    assert len({(path / HASHES).read_bytes() for path in outs}) == 1
    assert len(answered) == 1
    assert not list((short.paths.root / ".resume").iterdir())


def test_several_draws_are_those_of_several_seeds(short, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(short.paths.root))
    space = short.set(decode__temperature=1.5)
    together = decode_kept(space, "stage1", 2)
    alone = [decode_kept(space.set(seed=space.params.seed + k), "stage1")[0] for k in range(2)]
    texts = [[r.raw_text for r in results] for results in together]
    assert texts == [[r.raw_text for r in results] for results in alone]
    assert texts[0] != texts[1]


def test_stored_answers_that_do_not_match_are_rejected(workspace):
    space = workspace.set(decode__grammar="any", decode__max_new_tokens=120)
    decode(space)
    path = space.paths.decoded("stage1") / DISTRIBUTIONS
    (path.parent / HASHES).unlink()
    whole = np.load(path)
    for damage, words in (
        (whole[:-1], "answers.jsonl has"),
        (whole[:, :, :9], r"expected float16 \(objects, 4, 1000\)"),
        (whole.astype(np.float64), "holds float64"),
    ):
        np.save(path, damage)
        with pytest.raises(DataError, match=words):
            decoded(space)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="truncated or edited"):
        decoded(space)


def test_other_weights_decode_again(short):
    before = decode(short)["identity"]
    weights = short.paths.run("stage1") / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(sorted(tensors)))
    save_file(tensors | {name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    after = decode(short)["identity"]
    assert before["model"] != after["model"]
    assert {k: v for k, v in before.items() if k != "model"} == {k: v for k, v in after.items() if k != "model"}


def test_a_model_without_coordinate_tokens_is_read_as_digits(short):
    """Its prompt is written by its own tokenizer."""
    tokenizer = new_tokenizer()
    folder = short.paths.root / "base"
    save_model(folder, build_tiny(tokenizer, 3), tokenizer)
    summary = decode(short, "base", folder)
    assert (summary["codec"], summary["images"], summary["checkpoint"]) == ("digits", 6, "base")
    assert [answer.probs_N4K for answer in decoded(short, "base")] == [None] * 6
    stage1 = decode(short)
    assert stage1["codec"] == "json"
    assert summary["identity"]["decode"] != stage1["identity"]["decode"]
