"""The objective: an ordered list of named terms, each a sum over slots, a count and a weight.

    loss = sum over terms of  weight * sum / denominator

With global denominators (the counts of all micro-batches and ranks of one optimizer step) the losses and logs of the
micro-batches add up to those of the step, however the slots are packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from coordexp.errors import ConfigError, TrainingError
from coordexp.losses.terms import TermSum, positive_or_one

COORD_SUPERVISION = ("softce", "w1", "gate", "coord_ce")
SIGNED = frozenset({"entropy"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveWeights:
    """Weight of each term; 0 means the term is not computed. The order of the fields is the order of the terms.

    Weights are >= 0, but for those in SIGNED: a positive entropy weight sharpens distributions against several modes, a
    negative one rewards spread against overconfidence (Pereyra et al. 2017, arXiv:1701.06548).

    Raises ConfigError for a weight out of range or not finite.
    """

    text_ce: float = 0.0
    text_gate: float = 0.0
    softce: float = 0.0
    w1: float = 0.0
    gate: float = 0.0
    coord_ce: float = 0.0
    entropy: float = 0.0
    bbox_smoothl1: float = 0.0
    bbox_l1: float = 0.0
    bbox_giou: float = 0.0
    bbox_ciou: float = 0.0
    bbox_log_wh: float = 0.0
    duplicate_unlikelihood: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self.as_dict().items():
            lowest = -math.inf if name in SIGNED else 0.0
            if not (math.isfinite(weight) and weight >= lowest):
                wanted = "a finite number" if name in SIGNED else "a finite number >= 0"
                raise ConfigError(f"{name}_weight: found {weight}, expected {wanted} (0 turns it off).")

    def as_dict(self) -> dict[str, float]:
        """Weights by term name, in order."""
        return {name: getattr(self, name) for name in TERM_ORDER}

    @property
    def wanted(self) -> frozenset[str]:
        """Names of the terms with a weight: what the term functions are asked to compute."""
        return frozenset(name for name, weight in self.as_dict().items() if weight != 0)

    def require_coord_supervision(self, key_prefix: str = "") -> None:
        """Raise ConfigError if coordinate tokens would get no token loss at all; for a run that supervises them.

        key_prefix: where the weights stand in the parameters, for example "stage1.".
        """
        if self.wanted.isdisjoint(COORD_SUPERVISION):
            keys = ", ".join(f"{key_prefix}{name}_weight" for name in COORD_SUPERVISION)
            raise ConfigError(
                f"{keys}: all are 0, so nothing would train the coordinate tokens (the text loss leaves them out). "
                f"Expected at least one > 0: set {key_prefix}coord_ce_weight and {key_prefix}gate_weight to 1 for "
                "plain cross-entropy."
            )


TERM_ORDER = tuple(field.name for field in fields(ObjectiveWeights))


def weighted_terms(
    terms: Mapping[str, TermSum], weights: ObjectiveWeights, denominators: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """weight * sum / denominator of each term with a weight, in the order of the objective; each carries its graph.

    What a monitor of per-term gradients differentiates. A denominator of 0 divides by 1.

    Args:
        terms: sums and counts by name; names as in ObjectiveWeights.
        weights: weights; a term of weight 0 is left out.
        denominators: global count of every term given, or None for its own count. Where the trainer averages gradients
            over W ranks, pass the global count divided by W.
    """
    unknown = terms.keys() - set(TERM_ORDER)
    assert not unknown, f"terms without a weight: {sorted(unknown)}"
    weight_of = weights.as_dict()
    return {
        name: weight_of[name] * normalised(name, terms[name], denominators)
        for name in TERM_ORDER
        if name in terms and weight_of[name] != 0
    }


def loss_factors(weights: ObjectiveWeights, denominators: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """weight / denominator of each term with a weight: what its sum is multiplied by in `combine`."""
    weight_of = weights.as_dict()
    return {name: weight_of[name] / positive_or_one(denominators[name]) for name in weights.wanted}


def normalised(name: str, term: TermSum, denominators: Mapping[str, Tensor] | None) -> Tensor:
    """sum / denominator of one term; the denominator is its own count if none are given."""
    return term.mean() if denominators is None else term.sum / positive_or_one(denominators[name].to(term.sum))


def combine(
    terms: Mapping[str, TermSum], weights: ObjectiveWeights, denominators: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (scalar with a graph) and its logs; arguments as for `weighted_terms`.

    Logs (detached scalars): `loss/<term>` after weighting, `raw/<term>` before, `count/<term>` of this batch.

    Raises:
        TrainingError: the loss is not finite; the message lists every term.
    """
    weighted = weighted_terms(terms, weights, denominators)
    assert weighted, f"no term with a weight among {sorted(terms)}"
    loss = torch.stack(list(weighted.values())).sum()
    logs: dict[str, Tensor] = {}
    for name in TERM_ORDER:
        if name in terms:
            if name in weighted:
                logs[f"loss/{name}"] = weighted[name].detach()
            logs[f"raw/{name}"] = normalised(name, terms[name], denominators).detach()
            logs[f"count/{name}"] = terms[name].count
    if not torch.isfinite(loss):
        listing = ", ".join(f"{key}={float(value):.4g}" for key, value in logs.items())
        raise TrainingError(
            f"the loss is {loss.item()}; terms: {listing}. Expected finite values: lower the learning rate, or look in "
            "the batch for a target outside its range."
        )
    return loss, logs
