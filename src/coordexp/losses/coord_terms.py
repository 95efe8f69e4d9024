"""Loss terms on coordinate slots: softCE, W1, gate, hard CE, entropy (the CoordExp objective).

For one slot with logits z over V, coordinate slice s, temperature T: p = softmax(s / T) over the K = 1000 bins,
P = softmax(z / T) over V, m = P(coordinate ids), target distribution q, rounded target bin t.

    softce    -sum q log p                    gradient on s  (p - q) / T
    w1        sum |CDF_p - CDF_q| / (K - 1)   bounded by sd(p) / (T (K - 1)): refines, cannot repair
    gate      -log m                          the only term that sees the other V - K ids
    coord_ce  -log p_t, always at T = 1       coord_ce + gate at T = 1 is ordinary cross-entropy, exactly
    entropy   -sum p log p                    weight > 0 discourages several modes, < 0 overconfidence

N slots, V vocabulary, K bins. Everything is float32 inside (float64 stays float64).
"""

from __future__ import annotations

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor

from coordexp.geometry.bins import MAX_BIN
from coordexp.losses.partition import VocabularyPartition, scale
from coordexp.losses.soft_targets import SoftTarget, rounded_bins
from coordexp.losses.terms import TermSum, sum_slots

COORD_TERMS = ("softce", "w1", "gate", "coord_ce", "entropy")


def coordinate_terms(
    logits_NV: Tensor,
    target_bins_N: Tensor,
    first_coord_id: int,
    target: SoftTarget,
    temperature: float,
    wanted: Collection[str],
    weights_N: Tensor | None = None,
) -> dict[str, TermSum]:
    """Sums of the wanted terms over N coordinate slots; names in `wanted` that are not in COORD_TERMS are not for us.

    Args:
        logits_NV: full-vocabulary logits, one row per supervised coordinate slot (N may be 0); any float dtype.
        target_bins_N: unrounded target bins in [0, 999].
        first_coord_id: id of the token of bin 0; the 1000 ids are consecutive.
        target: family and width of q, for softce and w1.
        temperature: T > 0 of softce, w1, gate and entropy; coord_ce stays at 1.
        wanted: names of the terms to compute (those with a weight).
        weights_N: weight of each slot, >= 0; default 1.
    """
    logits = VocabularyPartition.of(logits_NV, first_coord_id)
    terms = slice_terms(logits.coord_NK, target_bins_N, target, temperature, wanted, weights_N)
    if "gate" in wanted:
        terms["gate"] = sum_slots(gate(logits.text_log_odds(temperature)), weights_N)
    return terms


def slice_terms(
    coord_NK: Tensor,
    target_bins_N: Tensor,
    target: SoftTarget,
    temperature: float,
    wanted: Collection[str],
    weights_N: Tensor | None = None,
) -> dict[str, TermSum]:
    """What `coordinate_terms` computes but for the gate: it needs float32 logits (N, K) of the coordinate ids alone."""
    values: dict[str, Tensor] = {}
    log_p_NK = F.log_softmax(scale(coord_NK, temperature), dim=-1)
    if "softce" in wanted or "w1" in wanted:
        q_NK = target.distribution(target_bins_N, dtype=log_p_NK.dtype)
        if "softce" in wanted:
            values["softce"] = soft_cross_entropy(log_p_NK, q_NK)
        if "w1" in wanted:
            values["w1"] = wasserstein1(log_p_NK.exp(), q_NK)
    if "coord_ce" in wanted:
        log_p1_NK = log_p_NK if temperature == 1 else F.log_softmax(coord_NK, dim=-1)
        values["coord_ce"] = hard_cross_entropy(log_p1_NK, rounded_bins(target_bins_N))
    if "entropy" in wanted:
        values["entropy"] = entropy(log_p_NK)
    return {name: sum_slots(values_N, weights_N) for name, values_N in values.items()}


def soft_cross_entropy(log_p_NK: Tensor, q_NK: Tensor) -> Tensor:
    """(N,) -sum_k q_k log p_k in nats; its minimum is the entropy of q, not 0."""
    return -(q_NK * log_p_NK).sum(-1)


def hard_cross_entropy(log_p_NK: Tensor, target_bins_N: Tensor) -> Tensor:
    """(N,) -log p_t in nats, for integer target bins (N,)."""
    return -log_p_NK.gather(-1, target_bins_N[:, None]).squeeze(-1)


def wasserstein1(p_NK: Tensor, q_NK: Tensor) -> Tensor:
    """(N,) W1 between two distributions over bins, divided by K - 1: W1(delta_a, delta_b) = |a - b| / 999, in [0, 1].

    In one dimension W1 is the L1 distance of the CDFs. Accumulating p - q, instead of subtracting two CDFs, keeps the
    float32 rounding small where both are near 1. The last entry is 1 - 1 and is left out.
    """
    return (p_NK - q_NK).cumsum(-1)[:, :-1].abs().sum(-1) / MAX_BIN


def gate(text_log_odds_N: Tensor) -> Tensor:
    """(N,) -log m >= 0: logsumexp over the vocabulary minus logsumexp over the coordinate slice."""
    return -F.logsigmoid(-text_log_odds_N)


def entropy(log_p_NK: Tensor) -> Tensor:
    """(N,) entropy of p in nats."""
    return -(log_p_NK.exp() * log_p_NK).sum(-1)
