"""Forwards over packed batches that stop before the head, so that logits exist for supervised slots only.

Shapes: B rows, T tokens, D hidden size, S slots, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from coordexp.models.attention import packed
from coordexp.packing.collator import PackedBatch


def hidden_states(
    model: Qwen3VLForConditionalGeneration, batch: PackedBatch, inputs_embeds_BTD: Tensor | None = None
) -> Tensor:
    """Last hidden states, flattened to (B * T, D); `inputs_embeds_BTD` replaces the token embeddings if given.

    Bounds of segments and pictures keep them apart (models/attention.py), and no attention mask is built. A model that
    transformers' own attention was left to is given the same by a T x T mask, which it makes of the 4-row position ids.
    """
    with packed():
        output = model.model(
            input_ids=batch.input_ids if inputs_embeds_BTD is None else None,
            inputs_embeds=inputs_embeds_BTD,
            position_ids=batch.position_ids,
            attention_mask=None,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
            use_cache=False,
            segments=batch.segments,
            pictures=batch.pictures,
        )
    return output.last_hidden_state.flatten(0, 1)


def input_table(model: Qwen3VLForConditionalGeneration) -> nn.Embedding:
    """The embedding of the input tokens, weights (V, D)."""
    # While rows train beside frozen ones (models/adapters.py) it is PEFT's wrapper, whose `weight` holds both.
    return cast(nn.Embedding, model.get_input_embeddings())


def head_table(model: Qwen3VLForConditionalGeneration) -> Tensor:
    """Weights (V, D) of the head; like `input_table`, of PEFT's wrapper while rows train beside frozen ones."""
    return cast(nn.Linear, model.lm_head).weight


def trains_coordinate_rows_only(model: Qwen3VLForConditionalGeneration) -> bool:
    """Whether the head is such a wrapper: then a gradient on its other rows would be thrown away."""
    return not isinstance(model.lm_head, nn.Linear)


def slot_logits(model: Qwen3VLForConditionalGeneration, hidden_flat: Tensor, slots_S: Tensor) -> Tensor:
    """Logits (S, V) at the given flat positions."""
    return model.lm_head(torch.index_select(hidden_flat, 0, slots_S))
