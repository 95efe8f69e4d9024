"""Soft self-context (channel A): several forwards in which coordinate inputs come from the model's own predictions.

Forward 0 uses the ground-truth coordinate embeddings. Each later forward replaces the input embedding of every
supervised coordinate token by one made from the previous forward's distribution at its slot. All slots are replaced at
once, as in a Jacobi iteration. `n_softctx_iter` counts all forwards, so 1 is plain teacher forcing.

The text loss uses forward 0 and the coordinate loss the last forward. With `em_detach`, gradients do not flow through
the context embeddings, but both of these forwards keep their graphs: without that of forward 0, text would not train.

Shapes: N coordinate slots, K bins, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from coordexp.config.schema import Params, ReadoutRule
from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.readout import read
from coordexp.models.coordinate_rows import coordinate_rows
from coordexp.models.forward import hidden_states, input_table, slot_logits
from coordexp.packing.collator import PackedBatch


def context_embeddings(slice_logits_NK: Tensor, table_KD: Tensor, temperature: float, mode: ReadoutRule) -> Tensor:
    """(N, D) input embeddings read from coordinate distributions by a rule of losses/readout.py."""
    return read(mode, (slice_logits_NK.float() / temperature).softmax(-1), table_KD.float())


def self_contexts(
    model: Qwen3VLForConditionalGeneration,
    batch: PackedBatch,
    first: Tensor,
    params: Params,
    first_coord_id: int,
    n_forwards: int,
) -> Iterator[Tensor]:
    """Hidden states (B * T, D) of the second to the last of `n_forwards` forwards, given those of the first."""
    last = first
    coord_tokens_N = batch.coord_slots + 1  # a slot predicts the next token
    span = slice(first_coord_id, first_coord_id + NUM_BINS)
    for _ in range(n_forwards - 1):
        table_KD = coordinate_rows(input_table(model), span)
        slice_logits_NK = slot_logits(model, last, batch.coord_slots)[:, span]
        mode = params.stage2.coord_ctx_embed_mode
        slot_embeds_ND = context_embeddings(slice_logits_NK, table_KD, params.temperature, mode)
        if params.stage2.softctx_grad_mode == "em_detach":
            slot_embeds_ND = slot_embeds_ND.detach()
        embeds_BTD = input_table(model)(batch.input_ids)
        flat = embeds_BTD.flatten(0, 1)
        flat = flat.index_copy(0, coord_tokens_N, slot_embeds_ND.to(flat.dtype))
        last = hidden_states(model, batch, flat.view_as(embeds_BTD))
        yield last
