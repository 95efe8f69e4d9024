"""Re-scoring: the packed teacher-forced forward gives the probabilities that generation itself had."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coordexp.rollout.engine import Generation
from coordexp.rollout.hf_engine import HfEngine
from helpers import decode_request, new_checkpoint, token_logprobs


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


def generate_with_logprobs(world, checkpoint, monkeypatch, penalty: float):
    """Generations, and per sample the log-probability of each token by the logits that `generate` computed."""
    seen = []
    original = checkpoint.model.generate

    def recording(**kwargs):
        output = original(**kwargs, return_dict_in_generate=True, output_logits=True)
        steps_TBV = torch.stack(output.logits).log_softmax(-1)
        new_BT = output.sequences[:, -len(output.logits) :]
        seen.append(steps_TBV.transpose(0, 1).gather(-1, new_BT[..., None]).squeeze(-1))
        return output.sequences

    monkeypatch.setattr(checkpoint.model, "generate", recording)
    request = decode_request(max_new_tokens=12, repetition_penalty=penalty)
    # One image a batch, in order: what was recorded is then one row per sample.
    samples = sorted(world.samples, key=lambda sample: sample.prompt_length)
    generations = HfEngine(checkpoint, world.root, 1).generate(samples, request)
    logprobs = [row[0, : len(g.ids)].double().numpy() for row, g in zip(seen, generations, strict=True)]
    return samples, generations, logprobs


@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("images_per_forward", [1, 4])
def test_log_probabilities_are_those_of_generation(world, checkpoint, monkeypatch, penalty, images_per_forward):
    """A penalty shapes what is chosen, never how likely the model holds it."""
    samples, generations, expected = generate_with_logprobs(world, checkpoint, monkeypatch, penalty)
    found = token_logprobs(checkpoint, world.collator(checkpoint), samples, generations, images_per_forward)
    assert len(found) == len(samples)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert max(np.ptp(values) for values in found) > 0.01


def test_answers_of_any_length_keep_their_samples(world, checkpoint):
    """Packed together in an order of their own, each sample gets back its own row."""
    cut = [3, 12, 1, 7, 5, 9]
    generations = [Generation(s.answer_ids[:n], "length") for s, n in zip(world.samples, cut, strict=True)]
    found = token_logprobs(checkpoint, world.collator(checkpoint), world.samples, generations, 6)
    assert [len(values) for values in found] == [len(g.ids) for g in generations]
    for sample, generation, values in zip(world.samples, generations, found, strict=True):
        (alone,) = token_logprobs(checkpoint, world.collator(checkpoint), [sample], [generation], 1)
        np.testing.assert_allclose(values, alone, atol=1e-4)


def test_a_longer_answer_begins_with_the_values_of_the_shorter(world, checkpoint):
    sample, collator = world.store[0], world.collator(checkpoint)
    generations = [Generation(sample.answer_ids[:n], "length") for n in (4, 11)]
    short, long = (token_logprobs(checkpoint, collator, [sample], [g], 1)[0] for g in generations)
    np.testing.assert_allclose(long[:4], short, atol=1e-5)


def test_a_model_in_training_goes_on_training(world, checkpoint):
    checkpoint.model.train()
    generation = Generation(world.store[0].answer_ids, "stop")
    (values,) = token_logprobs(checkpoint, world.collator(checkpoint), [world.store[0]], [generation], 1)
    assert checkpoint.model.training
    assert not torch.is_inference_mode_enabled()
    assert (values <= 0).all()
    checkpoint.model.eval()
