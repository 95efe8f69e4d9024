"""The distributions at coordinate slots, against a plain forward."""

from __future__ import annotations

import numpy as np
import torch

from coordexp.packing.collator import coordinate_positions
from coordexp.rollout.engine import Generation
from coordexp.rollout.rescore import rescore
from helpers import World, new_checkpoint
from transformers_generate import model_inputs


def teacher(world: World) -> tuple[list[Generation], list[np.ndarray]]:
    """The annotated answers as generations, and where their coordinates are."""
    generations = [Generation(s.answer_ids, "stop") for s in world.samples]
    return generations, [coordinate_positions(s.answer_roles) for s in world.samples]


def test_distributions_are_those_of_a_plain_forward(world: World) -> None:
    """Packed and head-only, against transformers' own forward of each sample alone."""
    checkpoint = new_checkpoint()
    assert checkpoint.coord is not None
    generations, positions = teacher(world)
    rescored = rescore(checkpoint, world.collator(checkpoint), world.samples, generations, positions, 4)
    assert sum(map(len, positions)) > 6
    for sample, where, row in zip(world.samples, positions, rescored, strict=True):
        inputs = model_inputs(checkpoint, world.root, [sample])
        answer = torch.from_numpy(sample.answer_ids.astype(np.int64))[None]
        prompt_length = inputs["input_ids"].shape[1]
        for name, more in (("input_ids", answer), ("attention_mask", answer > -1), ("mm_token_type_ids", answer * 0)):
            inputs[name] = torch.cat([inputs[name], more.long()], dim=1)
        with torch.inference_mode():
            logits = checkpoint.model(**inputs).logits[0, prompt_length - 1 :]
        expected = logits[where, checkpoint.coord.first_id : checkpoint.coord.end_id].softmax(-1).numpy()
        np.testing.assert_allclose(row.coord_probs_N4K, expected, atol=1e-5)


def test_more_slots_than_one_head_pass_holds(world: World, monkeypatch) -> None:
    checkpoint = new_checkpoint()
    generations, positions = teacher(world)
    whole = rescore(checkpoint, world.collator(checkpoint), world.samples, generations, positions, 6)
    monkeypatch.setattr("coordexp.rollout.rescore._SLOTS_PER_HEAD", 3)
    parts = rescore(checkpoint, world.collator(checkpoint), world.samples, generations, positions, 6)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a.logprobs_A, b.logprobs_A, atol=1e-5)
        np.testing.assert_allclose(a.coord_probs_N4K, b.coord_probs_N4K, atol=1e-6)
