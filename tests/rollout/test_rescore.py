"""Re-scoring: the packed teacher-forced forward gives the probabilities that generation itself had."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coordexp.rollout.engine import Generation
from helpers import decode_request, new_checkpoint, token_logprobs
from transformers_generate import generate, model_inputs, options_of


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("images_per_forward", [1, 4])
def test_log_probabilities_are_those_of_generation(world, checkpoint, penalty, images_per_forward):
    """By the logits that `generate` computed. A penalty shapes what is chosen, never how likely the model holds it."""
    request, samples = decode_request(max_new_tokens=12, repetition_penalty=penalty), world.samples
    options = options_of(checkpoint, request) | {"output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode():
        output = checkpoint.model.generate(**model_inputs(checkpoint, world.root, samples), **options)
    steps_BTV = torch.stack(output.logits, dim=1).log_softmax(-1)
    generations = generate(checkpoint, world.root, samples, request, len(samples))
    found = token_logprobs(checkpoint, world.collator(checkpoint), samples, generations, images_per_forward)
    for ours, generation, steps_TV in zip(found, generations, steps_BTV, strict=True):
        ids = torch.from_numpy(generation.ids.astype(np.int64))
        theirs = steps_TV[: len(ids)].gather(-1, ids[:, None])[:, 0].numpy()
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


def test_a_model_in_training_mode_returns_to_it(world, checkpoint):
    checkpoint.model.train()
    generation = Generation(world.store[0].answer_ids, "stop")
    (values,) = token_logprobs(checkpoint, world.collator(checkpoint), [world.store[0]], [generation], 1)
    assert checkpoint.model.training
    assert not torch.is_inference_mode_enabled()
    assert (values <= 0).all()
    checkpoint.model.eval()
