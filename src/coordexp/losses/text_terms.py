"""Loss terms on text slots: token cross-entropy, and the text gate that keeps coordinate tokens out of text.

N slots, V vocabulary. Everything is float32 inside (float64 stays float64).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor

from coordexp.losses.partition import VocabularyPartition, at_least_float32
from coordexp.losses.terms import TermSum, sum_slots

TEXT_TERMS = ("text_ce", "text_gate")
# -log of the smallest text mass that is still penalised more: beyond it the gate is flat, so one hopeless slot cannot
# dominate a batch.
MAX_TEXT_GATE = -math.log(1e-6)


def text_terms(
    logits_NV: Tensor,
    target_ids_N: Tensor,
    first_coord_id: int | None,
    temperature: float,
    wanted: Collection[str],
    weights_N: Tensor | None = None,
    gate_weights_N: Tensor | None = None,
) -> dict[str, TermSum]:
    """Sums of the wanted terms over N text slots.

    Args:
        logits_NV: full-vocabulary logits, one row per supervised text slot (N may be 0); any float dtype.
        target_ids_N: target token ids.
        first_coord_id: id of the token of bin 0; None for a vocabulary without coordinate tokens (then no text gate).
        temperature: T > 0 of the text gate; cross-entropy stays at 1.
        wanted: names of the terms to compute; those not in TEXT_TERMS are not for us.
        weights_N: weight of each slot in text_ce (end of sequence, closing bracket), >= 0; default 1.
        gate_weights_N: weight of each slot in text_gate, 0 at the end-of-sequence token; default 1.
    """
    logits_NV = at_least_float32(logits_NV)
    terms: dict[str, TermSum] = {}
    if "text_ce" in wanted:
        terms["text_ce"] = sum_slots(F.cross_entropy(logits_NV, target_ids_N, reduction="none"), weights_N)
    if "text_gate" in wanted:
        assert first_coord_id is not None, "text_gate needs a vocabulary with coordinate tokens"
        text_log_odds_N = VocabularyPartition.of(logits_NV, first_coord_id).text_log_odds(temperature)
        terms["text_gate"] = sum_slots(text_gate(text_log_odds_N), gate_weights_N)
    return terms


def text_gate(text_log_odds_N: Tensor) -> Tensor:
    """(N,) -log clamp(1 - m, 1e-6, 1) with m = P(coordinate ids); no gradient where clamped."""
    return (-F.logsigmoid(text_log_odds_N)).clamp(max=MAX_TEXT_GATE)
