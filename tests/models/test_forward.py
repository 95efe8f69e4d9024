"""Our forward pass (packed, without mask, head on slots only) equals that of the model.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coordexp.models.forward import hidden_states, slot_logits
from coordexp.packing.collator import teacher_segment
from helpers import new_checkpoint


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


@pytest.fixture(scope="module")
def batch(world, checkpoint):
    return world.collator(checkpoint)([teacher_segment(world.store[0])])


@torch.no_grad()
def test_logits_equal_those_of_the_plain_model(world, checkpoint):
    model, image_id = checkpoint.model, checkpoint.model.config.image_token_id
    for sample in world.samples:
        batch = world.collator(checkpoint)([teacher_segment(sample)])
        expected_TV = model(
            input_ids=batch.input_ids,
            attention_mask=torch.ones_like(batch.input_ids),
            mm_token_type_ids=(batch.input_ids == image_id).int(),
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
        ).logits[0]
        slots = torch.arange(batch.input_ids.numel())
        logits_TV = slot_logits(model, hidden_states(model, batch), slots)
        torch.testing.assert_close(logits_TV, expected_TV, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_slots_select_rows_in_their_order(checkpoint, batch):
    hidden_TD = hidden_states(checkpoint.model, batch)
    all_TV = checkpoint.model.lm_head(hidden_TD)
    slots = torch.tensor([9, 2, 2])
    torch.testing.assert_close(slot_logits(checkpoint.model, hidden_TD, slots), all_TV[slots])
    assert slot_logits(checkpoint.model, hidden_TD, slots[:0]).shape == (0, all_TV.shape[1])


@torch.no_grad()
def test_given_embeddings_replace_the_token_embeddings(checkpoint, batch):
    model = checkpoint.model
    embeds = model.get_input_embeddings()(batch.input_ids)
    plain = hidden_states(model, batch)
    torch.testing.assert_close(hidden_states(model, batch, embeds), plain)
    last = batch.input_ids.shape[1] - 1
    changed = embeds.clone()
    changed[0, last] += 1.0
    moved = (hidden_states(model, batch, changed) - plain).abs().amax(-1)
    assert moved[:last].max() == 0  # causal
    assert moved[last] > 1e-3


@torch.no_grad()
def test_the_image_affects_the_answer(world, checkpoint, batch):
    other = replace(batch, pixel_values=batch.pixel_values.flip(0))
    first_slot = int(batch.text_slots[0])
    difference = hidden_states(checkpoint.model, batch)[first_slot] - hidden_states(checkpoint.model, other)[first_slot]
    assert difference.abs().max() > 1e-3
