"""The terms that see the whole vocabulary on stored logits, for a vocabulary so small that they are megabytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.coord_terms import gate
from coordexp.losses.partition import VocabularyPartition
from coordexp.losses.terms import computed, sum_slots
from coordexp.losses.vocabulary_terms import text_gate, unlikelihood
from coordexp.models.forward import head_table, slot_logits
from coordexp.packing.collator import PackedBatch
from coordexp.text.codecs import Role

LARGE_VOCABULARY = 32_768


def fused_pays(model: Qwen3VLForConditionalGeneration) -> bool:
    """Whether the vocabulary is large enough for the pass in chunks."""
    return len(head_table(model)) >= LARGE_VOCABULARY


def plain_sums(
    model: Qwen3VLForConditionalGeneration,
    weights: dict[str, float],
    first_coord_id: int,
    temperature: float,
    batch: PackedBatch,
    text_hidden: Tensor | None,
    coord_hidden: Tensor,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """As `_vocabulary_sums` of the step."""
    sums: dict[str, Tensor] = {}
    if text_hidden is not None:
        hidden = text_hidden.float()
        logits_NV = slot_logits(model, hidden, batch.text_slots)
        if computed(weights, "text"):
            values_N = F.cross_entropy(logits_NV, batch.text_targets, reduction="none")
            sums["text_ce"] = sum_slots(values_N, batch.text_weights)
        if computed(weights, "inner_text"):
            odds_N = VocabularyPartition.of(logits_NV, first_coord_id).text_log_odds(temperature)
            sums["text_gate"] = sum_slots(text_gate(odds_N), (batch.text_roles != int(Role.CLOSE)).float())
        if computed(weights, "unlikely"):
            logits_UV, ids_U1 = slot_logits(model, hidden, batch.unlikely_slots), batch.unlikely_ids[:, None]
            rest_U = logits_UV.scatter(-1, ids_U1, -torch.inf).logsumexp(-1)
            sums["duplicate_unlikelihood"] = sum_slots(unlikelihood(logits_UV.gather(-1, ids_U1)[:, 0] - rest_U))
    coord_NV = slot_logits(model, coord_hidden.float(), batch.coord_slots)
    partition = VocabularyPartition.of(coord_NV, first_coord_id)
    if weights.get("gate"):
        sums["gate"] = sum_slots(gate(partition.text_log_odds(temperature)))
    with torch.no_grad():
        odds_N = partition.text_log_odds(temperature)
    span = slice(first_coord_id, first_coord_id + NUM_BINS)
    return sums, partition.coord_NK, odds_N, coord_NV[:, span]
