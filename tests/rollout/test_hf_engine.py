"""The engine: grouping changes no answer, results keep the order of the samples, what is finished is not lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from coordexp.packing.collator import teacher_segment
from coordexp.rollout.engine import Journal, TokenProbs
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.rescore import rescore
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
def test_an_interrupted_run_goes_on_after_its_last_group(world, checkpoint, tmp_path, monkeypatch, request_):
    monkeypatch.setattr("coordexp.rollout.hf_engine.GROUP_BATCHES", 1)
    undisturbed = all_bytes(HfEngine(checkpoint, world.root, 2).generate(world.samples, request_))
    original, groups = HfEngine._run, []

    def run(self, samples, *rest):
        groups.append(len(samples))
        if len(groups) == 3:
            raise Killed
        return original(self, samples, *rest)

    monkeypatch.setattr(HfEngine, "_run", run)
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
def test_a_model_in_training_goes_on_training(world, checkpoint, training):
    checkpoint.model.train(training)
    HfEngine(checkpoint, world.root, 1).generate(world.samples[:1], asked(GREEDY, max_new_tokens=1))
    assert checkpoint.model.training is training
    checkpoint.model.eval()


def test_no_samples_no_answers(world, checkpoint):
    assert HfEngine(checkpoint, world.root, 4).generate([], GREEDY) == []


def test_no_answer_holds_the_placeholder_of_a_picture(world):
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
