"""Forwards over packed batches that stop before the head, so that logits exist for supervised slots only.

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

    A cache is handed the keys and values of all tokens, and must return them as they are.

    The lengths of segments and images keep them apart (models/attention.py); no attention mask is built. A model to
    which transformers' own attention was left does the same by a T x T mask, made of the 4-row position ids, but never
    beside a cache.
    """
    assert cache is None or model.model.language_model.config._attn_implementation == TEXT, (
        "use_segment_attention first"
    )
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
    """What the vision tower makes of each patch, (P, D), as it goes into the merger; each image by itself."""
    with packed():
        output = visual(patches_PD, grid_thw=grids_I3, pictures=tuple(grids_I3.prod(1).tolist()))
    return output.last_hidden_state


def next_hidden_states(
    model: Qwen3VLForConditionalGeneration, ids_BT: Tensor, rope_BT: Tensor, mask_BTL: Tensor, cache: Cache
) -> Tensor:
    """Hidden states (B, T, D) of the next tokens of B texts whose keys and values a cache of L columns holds.

    Args:
        model: the model.
        ids_BT: the tokens.
        rope_BT: their rotary positions, the same on all three axes: text behind an image.
        mask_BTL: which columns each of them sees, its own among them.
        cache: holds what came before, and is handed what comes.
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
    # Or what stands for it while its coordinate rows alone train (models/coordinate_rows.py).
    return cast(nn.Embedding, model.get_input_embeddings())


def head_table(model: Qwen3VLForConditionalGeneration) -> Tensor:
    """Weights (V, D) of the head; without a gradient while its coordinate rows alone train."""
    return cast(nn.Linear, model.lm_head).weight


def slot_logits(model: Qwen3VLForConditionalGeneration, hidden_flat: Tensor, slots_S: Tensor) -> Tensor:
    """Logits (S, V) at the given flat positions."""
    return model.lm_head(torch.index_select(hidden_flat, 0, slots_S))
