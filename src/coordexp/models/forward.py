"""Forward passes over packed batches that stop before the head, so that logits exist only for supervised slots.

Shapes: B rows, T tokens, D hidden size, S slots, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import Cache, Qwen3VLForConditionalGeneration

from coordexp.models.attention import TEXT, packed
from coordexp.packing.collator import PackedBatch


def hidden_states(
    model: Qwen3VLForConditionalGeneration,
    batch: PackedBatch,
    inputs_embeds_BTD: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states, flattened to (B * T, D); `inputs_embeds_BTD` replaces the token embeddings if given.

    A cache receives the keys and values of all tokens, and must return them unchanged.

    The lengths of segments and images separate them (models/attention.py); no attention mask is built. A model with
    transformers' own attention does the same with a T x T mask built from the 4-row position ids, but not with a cache.
    """
    assert cache is None or model.model.language_model.config._attn_implementation == TEXT, (
        "use_segment_attention first"
    )
    # `model.model` stops before the head: logits of all B * T positions would take far more memory than the slots.
    with packed():
        output = model.model(
            input_ids=batch.input_ids if inputs_embeds_BTD is None else None,
            inputs_embeds=inputs_embeds_BTD,
            position_ids=batch.position_ids,
            attention_mask=None,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
            past_key_values=cache,
            use_cache=cache is not None,
            segments=batch.segments,
            pictures=batch.pictures,
        )
    return output.last_hidden_state.flatten(0, 1)


def patch_states(visual: nn.Module, patches_PD: Tensor, grids_I3: Tensor) -> Tensor:
    """The vision tower's state of each patch, (P, D), before the merger; each image attends only to itself."""
    with packed():
        output = visual(patches_PD, grid_thw=grids_I3, pictures=tuple(grids_I3.prod(1).tolist()))
    return output.last_hidden_state


def next_hidden_states(
    model: Qwen3VLForConditionalGeneration, ids_BT: Tensor, rope_BT: Tensor, mask_BTL: Tensor, cache: Cache
) -> Tensor:
    """Hidden states (B, T, D) of the next tokens of B sequences, with a cache of L columns.

    Args:
        model: the model.
        ids_BT: the tokens.
        rope_BT: their rotary positions, equal on all three axes, because they are text after an image.
        mask_BTL: the columns that each token attends to, including itself.
        cache: keys and values of the previous tokens; the new ones are added.
    """
    output = model.model(
        input_ids=ids_BT,
        position_ids=rope_BT.expand(3, *rope_BT.shape),
        attention_mask=mask_BTL[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state


def input_table(model: Qwen3VLForConditionalGeneration) -> nn.Embedding:
    """The embedding of the input tokens, weights (V, D)."""
    # Or its wrapper while only the coordinate rows are trained (models/coordinate_rows.py).
    return cast(nn.Embedding, model.get_input_embeddings())


def head_table(model: Qwen3VLForConditionalGeneration) -> Tensor:
    """Weights (V, D) of the head; without a gradient while only its coordinate rows are trained."""
    return cast(nn.Linear, model.lm_head).weight


def slot_logits(model: Qwen3VLForConditionalGeneration, hidden_flat: Tensor, slots_S: Tensor) -> Tensor:
    """Logits (S, V) at the given flat positions."""
    return model.lm_head(torch.index_select(hidden_flat, 0, slots_S))
