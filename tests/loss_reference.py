"""Textbook versions of the loss terms on stored logits, and the registry's versions on the same numbers."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.box_terms import box_pairs
from coordexp.losses.coord_terms import CoordSlots
from coordexp.losses.terms import TERMS
from helpers import PARAMS, changed


def terms_of(*places: str) -> list[str]:
    """Names of the registered terms of these places, in the order of the loss."""
    return [name for name, term in TERMS.items() if term.place in places]


def text_log_odds(logits_NV: Tensor, first_id: int, temperature: float = 1.0) -> Tensor:
    """(N,) log((1 - m) / m) with m = P(coordinate ids)."""
    is_coord_V = torch.zeros(logits_NV.shape[-1], dtype=torch.bool)
    is_coord_V[first_id : first_id + NUM_BINS] = True
    scaled_NV = logits_NV / temperature
    return scaled_NV[:, ~is_coord_V].logsumexp(-1) - scaled_NV[:, is_coord_V].logsumexp(-1)


def token_log_odds(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """(N,) log(P / (1 - P)) of a token of each slot."""
    rest_NV = logits_NV.scatter(-1, ids_N[:, None], -torch.inf)
    return logits_NV.gather(-1, ids_N[:, None])[:, 0] - rest_NV.logsumexp(-1)


def coord_slots(logits_NV: Tensor, bins_N: Tensor, first_id: int, **changes: object) -> CoordSlots:
    """Coordinate slots of full-vocabulary logits, at the default parameters but for `changes`."""
    params = changed(PARAMS, **changes)
    odds_N = text_log_odds(logits_NV.double() if logits_NV.dtype == torch.float64 else logits_NV.float(), first_id,
                           params.temperature)  # fmt: skip
    return CoordSlots(logits_NV[:, first_id : first_id + NUM_BINS], odds_N, bins_N, params)


def coord_sums(slots: CoordSlots, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Sums of coordinate terms (default: all)."""
    return {name: TERMS[name].values(slots).sum() for name in names or terms_of("coord")}


def box_sums(
    pred_B4: Tensor, target_B4: Tensor, beta_bins: float = 10.0, names: Collection[str] = ()
) -> dict[str, Tensor]:
    """Sums of box terms (default: all)."""
    pairs = box_pairs(pred_B4, target_B4, beta_bins)
    return {name: TERMS[name].values(pairs).sum() for name in names or terms_of("box")}


def textbook_text(logits_NV: Tensor, ids_N: Tensor, first_id: int) -> dict[str, Tensor]:
    """(N,) values of the text terms and the unlikelihood of a token, by softmax."""
    p_NV = logits_NV.softmax(-1)
    text_mass_N = 1 - p_NV[:, first_id : first_id + NUM_BINS].sum(-1)
    p_N = p_NV.gather(-1, ids_N[:, None])[:, 0]
    return {
        "text_ce": F.cross_entropy(logits_NV, ids_N, reduction="none"),
        "text_gate": -text_mass_N.clamp(min=1e-6).log(),
        "duplicate_unlikelihood": -(1 - p_N).clamp(min=1e-6).log(),
    }
