"""The in-memory engine: groups do not affect answers, results keep the order of samples, finished work is kept."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from coordexp.errors import ProcessError
from coordexp.models.loading import load_for_inference, load_format, save_checkpoint
from coordexp.packing.collator import teacher_segment
from coordexp.rollout import hf_engine, worker_engine
from coordexp.rollout.engine import Journal, TokenProbs
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.rescore import rescore
from coordexp.rollout.worker_engine import WorkerEngine, decode_devices
from helpers import asked, decode_request, new_checkpoint

GREEDY = decode_request(seed=17, max_new_tokens=10)
SAMPLED = asked(GREEDY, temperature=1.0)
NO_BOXES = np.zeros((0, 4), np.int64)


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


def answers(generations) -> list[list[int]]:
    return [g.ids.tolist() for g in generations]


@pytest.fixture(scope="module")
def one_by_one(world, checkpoint):
    return answers(HfEngine(checkpoint, world.root, 1).generate(world.samples, GREEDY))


@pytest.mark.parametrize("batch_images", [4, 6])
def test_batched_equals_one_by_one(world, checkpoint, one_by_one, batch_images):
    """Prompts differ in length and the batches are sorted by it; neither may show in an answer."""
    lengths = [sample.prompt_length for sample in world.samples]
    assert lengths != sorted(lengths)
    assert len({tuple(ids) for ids in one_by_one}) > 1  # the answers do depend on the image
    assert answers(HfEngine(checkpoint, world.root, batch_images).generate(world.samples, GREEDY)) == one_by_one


class Killed(BaseException):
    """Stands for `kill -9` in the middle of a group."""


def all_bytes(generations) -> list[tuple[bytes, ...]]:
    """Everything of the answers, to the last bit."""
    return [
        (g.ids.tobytes(), g.probs.logprobs_A.tobytes(), g.probs.coord_probs_CK.tobytes(), g.finish_reason.encode())
        for g in generations
    ]


@pytest.mark.parametrize("request_", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_interrupted_run_resumes_after_its_last_group(world, checkpoint, tmp_path, monkeypatch, request_):
    monkeypatch.setattr("coordexp.rollout.hf_engine.GROUP_BATCHES", 1)
    undisturbed = all_bytes(HfEngine(checkpoint, world.root, 2).generate(world.samples, request_))
    original, groups = hf_engine.answer_group, []

    def run(checkpoint, group, *rest):
        groups.append(len(group.samples))
        if len(groups) == 3:
            raise Killed
        return original(checkpoint, group, *rest)

    monkeypatch.setattr(hf_engine, "answer_group", run)
    journal = Journal(tmp_path / "generations.jsonl")
    engine = HfEngine(checkpoint, world.root, 2, journal)
    with pytest.raises(Killed):
        engine.generate(world.samples, request_)
    assert len(journal.read(2**31)) == 4
    whole = (tmp_path / "generations.jsonl").read_text()
    (tmp_path / "generations.jsonl").write_text(whole[:-20])  # the write that the kill cut
    assert all_bytes(engine.generate(world.samples, request_)) == undisturbed
    assert len(groups) == 3 + 2  # the group of the cut line and the third one
    assert all_bytes(engine.generate(world.samples, asked(request_, max_new_tokens=5))) != undisturbed
    assert engine.generate(world.samples, replace(request_, keep_probs=False))[0].probs is None
    (probs,) = {type(g.probs) for g in engine.generate(world.samples, request_)}
    assert probs is TokenProbs


def test_the_number_of_processes_does_not_change_a_byte(world, checkpoint, tmp_path, monkeypatch):
    """Nor does it whether one of them is killed, and the rest is answered by this process."""
    monkeypatch.setattr(hf_engine, "GROUP_BATCHES", 1)
    save_checkpoint(tmp_path / "model", checkpoint)
    samples = [replace(s, image_id=1000 * i + s.image_id) for i in range(3) for s in world.samples]
    loaded = load_for_inference(tmp_path / "model", "cpu")
    expected = all_bytes(HfEngine(loaded, world.root, 2).generate(samples, SAMPLED))
    place = tmp_path / "model", load_format(tmp_path / "model"), world.root, 2
    with closing(WorkerEngine(*place, ["cpu"] * 2)) as two:
        assert all_bytes(two.generate(samples, SAMPLED)) == expected
        parts = [samples[first : first + 5] for first in range(0, len(samples), 5)]
        streamed = all_bytes([g for part in two.stream(iter(parts), SAMPLED, world.root) for g in part])
        assert [ids for ids, *_ in streamed] == [ids for ids, *_ in expected]

    journal = Journal(tmp_path / "generations.jsonl")
    with closing(WorkerEngine(*place, ["cpu"] * 2, journal)) as two:

        def kill_one(*_: object) -> None:
            os.kill(next(iter(two._pool._processes)), signal.SIGKILL)

        monkeypatch.setattr(hf_engine.log, "info", kill_one)  # the first group is answered
        with pytest.raises(ProcessError, match=r"one of the 2 processes .* run the same command again"):
            two.generate(samples, SAMPLED)
    monkeypatch.undo()
    monkeypatch.setattr(hf_engine, "GROUP_BATCHES", 1)
    n_kept = len(journal.read(2**31))
    assert 2 <= n_kept < len(samples)
    original, answered = hf_engine.answer_group, []
    monkeypatch.setattr(hf_engine, "answer_group", lambda *a: answered.extend(a[1].samples) or original(*a))
    assert all_bytes(HfEngine(loaded, world.root, 2, journal).generate(samples, SAMPLED)) == expected
    assert 0 <= len(answered) - (len(samples) - n_kept) <= 3, "a group that was cut is answered whole"


@pytest.mark.parametrize(
    ("processes", "wanted", "gpus", "devices"),
    [
        (0, "auto", 0, ["auto"]),
        (3, "auto", 0, ["auto"] * 3),
        (0, "auto", 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (1, "auto", 4, ["auto"]),
        (3, "cuda", 2, ["cuda:0", "cuda:1", "cuda:0"]),
        (2, "cuda:1", 4, ["cuda:1"] * 2),
        (0, "cpu", 4, ["cpu"]),
    ],
)
def test_processes_take_the_gpus_in_turn(monkeypatch, processes, wanted, gpus, devices):
    kind = "cuda" if gpus and wanted != "cpu" else "cpu"
    monkeypatch.setattr(worker_engine, "choose_device", lambda _: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert decode_devices(processes, wanted) == devices


def test_the_order_of_the_samples_does_not_matter(world, checkpoint, one_by_one):
    generations = HfEngine(checkpoint, world.root, 3).generate(world.samples[::-1], GREEDY)
    assert answers(generations) == one_by_one[::-1]


def test_greedy_answers_are_the_most_likely_tokens(world, checkpoint, one_by_one):
    """One full forward without cache over prompt and answer: each token is the argmax at its slot."""
    sample, ids = world.samples[0], one_by_one[0]
    segment = replace(teacher_segment(sample), answer_ids=np.array(ids, np.int32))
    batch = world.collator(checkpoint).layout([replace(segment, text_weights=np.zeros(len(ids)))], [[0]])
    with torch.no_grad():
        logits = checkpoint.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
        ).logits[0]
    first = sample.prompt_length - 1
    assert logits[first : first + len(ids)].argmax(-1).tolist() == ids


def test_sampling_is_seeded(world, checkpoint, one_by_one):
    engine, samples = HfEngine(checkpoint, world.root, 6), world.samples
    drawn = answers(engine.generate(samples, SAMPLED))
    torch.rand(3)  # what happened to torch's generator before does not matter
    assert answers(engine.generate(samples, SAMPLED)) == drawn
    assert answers(engine.generate(samples, replace(SAMPLED, seed=18))) != drawn
    assert drawn != one_by_one


def test_a_tiny_nucleus_is_greedy(world, checkpoint, one_by_one):
    request_ = asked(SAMPLED, top_p=1e-6)
    assert answers(HfEngine(checkpoint, world.root, 6).generate(world.samples, request_)) == one_by_one


def test_the_token_budget_ends_an_answer(world, checkpoint):
    generations = HfEngine(checkpoint, world.root, 6).generate(world.samples, asked(GREEDY, max_new_tokens=3))
    end = checkpoint.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for generation in generations:
        assert len(generation.ids) == 3 or generation.ids[-1] == end
        assert (generation.finish_reason == "stop") == (generation.ids[-1] == end)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_training_mode_returns_to_it(world, checkpoint, training):
    checkpoint.model.train(training)
    HfEngine(checkpoint, world.root, 1).generate(world.samples[:1], asked(GREEDY, max_new_tokens=1))
    assert checkpoint.model.training is training
    checkpoint.model.eval()


def test_without_samples_there_are_no_answers(world, checkpoint):
    assert HfEngine(checkpoint, world.root, 4).generate([], GREEDY) == []


def test_no_answer_contains_an_image_placeholder(world):
    """The model would look for the picture of it when the answer is read again."""
    checkpoint = new_checkpoint()
    config = checkpoint.model.config
    favored = torch.tensor([config.image_token_id, config.video_token_id])
    with torch.no_grad():  # hidden states of a head row in its own direction are the likeliest
        checkpoint.model.lm_head.weight[favored] = 50 * checkpoint.model.lm_head.weight.mean(0)
    generations = HfEngine(checkpoint, world.root, 6).generate(world.samples, GREEDY)
    assert not np.isin(np.concatenate([g.ids for g in generations]), favored.numpy()).any()
    rescored = rescore(checkpoint, world.collator(checkpoint), world.samples, generations, [NO_BOXES] * 6, 6)
    assert all(np.isfinite(r.logprobs_A).all() for r in rescored)
