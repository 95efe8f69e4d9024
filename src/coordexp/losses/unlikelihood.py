"""Unlikelihood: push down one token at a slot, whatever comes instead (Welleck et al. 2020, arXiv:1908.04319, eq. 1).

N slots, V vocabulary. Everything is float32 inside (float64 stays float64).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.losses.partition import at_least_float32
from coordexp.losses.terms import TermSum, sum_slots

UNLIKELIHOOD_TERMS = ("duplicate_unlikelihood",)
# -log of the smallest remaining mass that is still penalised more: a token that is certain anyway gets no gradient, so
# one hopeless slot cannot dominate a batch.
MAX_UNLIKELIHOOD = -math.log(1e-6)


def unlikelihood_terms(logits_NV: Tensor, unwanted_ids_N: Tensor, wanted: Collection[str]) -> dict[str, TermSum]:
    """Sum over N slots of the unlikelihood of one token each; names in `wanted` that are not ours are ignored.

    Args:
        logits_NV: full-vocabulary logits, one row per slot (N may be 0); any float dtype.
        unwanted_ids_N: the token id to push down at each slot.
        wanted: names of the terms to compute.
    """
    if "duplicate_unlikelihood" not in wanted:
        return {}
    return {"duplicate_unlikelihood": sum_slots(unlikelihood(logits_NV, unwanted_ids_N))}


def unlikelihood(logits_NV: Tensor, unwanted_ids_N: Tensor) -> Tensor:
    """(N,) -log max(1 - P, 1e-6) with P the probability of the unwanted token; no gradient where clamped.

    A softplus of the log-odds of that token: exact where P is near 0 and 1 - P would round to 1.
    """
    logits_NV = at_least_float32(logits_NV)
    ids_N1 = unwanted_ids_N[:, None]
    rest_N = logits_NV.scatter(-1, ids_N1, -torch.inf).logsumexp(-1)
    return unlikelihood_at(logits_NV.gather(-1, ids_N1)[:, 0] - rest_N)


def unlikelihood_at(log_odds_N: Tensor) -> Tensor:
    """(N,) the same, from the log-odds log(P / (1 - P)) of the unwanted token."""
    return F.softplus(log_odds_N).clamp(max=MAX_UNLIKELIHOOD)
