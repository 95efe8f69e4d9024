"""What a packed batch asks of the whole vocabulary, as slots of one fused pass through the head.

N slots of the pass, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from coordexp.losses.fused_linear import FusedTerms, fused_terms
from coordexp.losses.head_sweep import FUSED_ROWS, FUSED_TERMS, LARGE_VOCABULARY, HeadSlots
from coordexp.losses.soft_targets import rounded_bins
from coordexp.models.forward import head_table, trains_coordinate_rows_only
from coordexp.packing.collator import PackedBatch
from coordexp.text.codecs import Role


@dataclass(frozen=True, slots=True)
class _Asked:
    """Slots of one kind: the temperature their logits are seen at, and their weights in the terms that they have."""

    hidden_flat: Tensor
    slots: Tensor
    token_ids: Tensor
    temperature: float
    weights: dict[str, Tensor]


def fused_pays(model: Qwen3VLForConditionalGeneration) -> bool:
    """Whether the vocabulary is large enough for the fused pass; the one place that decides it."""
    return len(head_table(model)) >= LARGE_VOCABULARY


def fused_batch_terms(
    model: Qwen3VLForConditionalGeneration,
    batch: PackedBatch,
    text_hidden: Tensor | None,
    coord_hidden: Tensor,
    first_coord_id: int,
    temperature: float,
    wanted: Collection[str],
    factors: Mapping[str, Tensor] | None,
) -> FusedTerms:
    """The wanted ones of FUSED_TERMS over a batch, and the logits of its coordinate slots divided by the temperature.

    Hidden states are (B * T, D); without `text_hidden` only coordinate slots are looked at. `factors` as in
    `fused_terms`.
    """
    asked = [_coord_slots(batch, coord_hidden, first_coord_id, temperature)]
    if text_hidden is not None:
        asked += _text_slots(batch, text_hidden, temperature, wanted)
    table_VD = head_table(model)
    absent = [torch.zeros(len(a.slots), device=table_VD.device) for a in asked]
    slots = HeadSlots(
        token_ids_N=torch.cat([a.token_ids for a in asked]),
        weights={
            name: torch.cat([a.weights.get(name, none) for a, none in zip(asked, absent, strict=True)])
            for name in FUSED_TERMS
            if name in wanted and any(name in a.weights for a in asked)
        },
        first_coord_id=first_coord_id,
        n_coord=len(batch.coord_slots),
    )
    rows_KD = table_VD[slots.span] if trains_coordinate_rows_only(model) else None
    hidden_ND = torch.cat([_scaled_hidden(a, table_VD.dtype) for a in asked])
    return fused_terms(hidden_ND, table_VD, slots, factors, FUSED_ROWS, rows_KD)


def _coord_slots(batch: PackedBatch, hidden: Tensor, first_coord_id: int, temperature: float) -> _Asked:
    ids = first_coord_id + rounded_bins(batch.coord_targets)
    ones = torch.ones_like(batch.coord_targets)
    return _Asked(hidden, batch.coord_slots, ids, temperature, {"gate": ones})


def _text_slots(batch: PackedBatch, hidden: Tensor, temperature: float, wanted: Collection[str]) -> list[_Asked]:
    """Text slots, twice if they are looked at under two temperatures, and slots with a token to push down."""
    gated = {"text_gate": (batch.text_roles != int(Role.CLOSE)).float()}
    by_temperature = {1.0: {"text_ce": batch.text_weights}}
    by_temperature[temperature] = by_temperature.get(temperature, {}) | gated
    asked = [
        _Asked(hidden, batch.text_slots, batch.text_targets, t, weights)
        for t, weights in by_temperature.items()
        if not weights.keys().isdisjoint(wanted)
    ]
    if "duplicate_unlikelihood" in wanted:
        ones = torch.ones_like(batch.unlikely_ids, dtype=torch.float32)
        asked.append(_Asked(hidden, batch.unlikely_slots, batch.unlikely_ids, 1.0, {"duplicate_unlikelihood": ones}))
    return asked


def _scaled_hidden(asked: _Asked, head_dtype: torch.dtype) -> Tensor:
    """Hidden states at the slots in the head's precision, divided by the temperature: so are their logits, then."""
    hidden = asked.hidden_flat.index_select(0, asked.slots).to(head_dtype)
    return hidden if asked.temperature == 1 else hidden / asked.temperature
