"""The registry of loss terms, and how the terms add up to a loss.

A term is one function with one declaration above it:

    @term("w1", "coord")
    def wasserstein1(p_NK, q_NK): ...

The function returns one value per slot of its place. The names of its arguments select its inputs: `token_log_odds_N`
and `text_log_odds_N` from the whole vocabulary (losses/vocabulary_terms.py), an attribute of `CoordSlots` from the
coordinate ids (losses/coord_terms.py), or an attribute of `BoxPairs` (losses/box_terms.py). Its weight is the parameter
`<name>_weight`; a stage uses the terms whose weights its parameter blocks define. Denominators, log rows, gradient
norms and the tables in the documentation follow from the registry.

    loss = sum over terms of  weight * sum over slots / count of its place in the whole step

Means over parts of a step cannot be added; sums and counts can. There is therefore one division, by the counts over all
micro-batches and processes of an optimizer step. It makes packed equal to unpacked training, and k accumulated
micro-batches equal to one batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from coordexp.config.block import Block

# Where a term applies, which also determines what its sum is divided by:
#   text        supervised text slots, each times its weight        inner_text  the same without the close, unweighted
#   coord       coordinate slots        box  boxes        unlikely  slots with a token to make less probable
#   reordered   coordinate tokens of the reordered annotation (channel B)
Place = Literal["text", "inner_text", "coord", "box", "unlikely", "reordered"]
OF_VOCABULARY = frozenset({"token_log_odds_N", "text_log_odds_N"})
Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the objective.

    signed: the weight may be negative, so the term is a regularizer. Every other coordinate term supervises
    coordinates.
    """

    name: str
    place: Place
    function: Callable[..., Tensor]
    arguments: tuple[str, ...]
    signed: bool

    @property
    def sees_vocabulary(self) -> bool:
        """Whether the term depends on more than the coordinate ids."""
        return not OF_VOCABULARY.isdisjoint(self.arguments)

    def values(self, slots: object) -> Tensor:
        """(N,) the value of the term at each slot."""
        return self.function(**{name: getattr(slots, name) for name in self.arguments})


TERMS: dict[str, Term] = {}  # by name, in the order of the loss; `losses/__init__.py` imports every declaring module


def term(name: str, place: Place, *, signed: bool = False) -> Callable[[Function], Function]:
    """Declare a term; see the module docstring."""

    def register(function: Function) -> Function:
        assert name not in TERMS, f"term {name} is declared twice"
        TERMS[name] = Term(name, place, function, tuple(inspect.signature(function).parameters), signed)
        return function

    return register


def supervises_coordinates(name: str) -> bool:
    """Whether the term trains the coordinate tokens, which the text loss leaves out."""
    return TERMS[name].place == "coord" and not TERMS[name].signed


def term_weights(*blocks: Block) -> dict[str, float]:
    """Weights by term name, for the terms that have a key in one of the parameter blocks."""
    keys = {name: f"{name}_weight" for name in TERMS}
    return {
        name: float(getattr(block, key))
        for name, key in keys.items()
        for block in blocks
        if key in type(block).model_fields
    }


def computed(weights: Mapping[str, float], place: Place) -> list[Term]:
    """The terms of a place that are computed: those with a nonzero weight, and all box terms, as they are cheap."""
    return [
        t
        for name, t in TERMS.items()
        if t.place == place and (weights.get(name) or (place == "box" and name in weights))
    ]


def at_least_float32(values: Tensor) -> Tensor:
    """Cast to float32; float64 stays, for gradient checks. The 8 bits of bf16 cannot resolve 1000 bins."""
    return values if values.dtype == torch.float64 else values.float()


def sum_slots(values_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Sum of per-slot values times their weights >= 0 (default 1); for no slots a 0 that is part of the graph."""
    if weights_N is None:
        return values_N.sum()
    weights_N = weights_N.to(values_N).detach()
    # A slot of weight 0 counts as absent: 0 * inf must not turn the whole sum into NaN.
    return (torch.where(weights_N > 0, values_N, torch.zeros_like(values_N)) * weights_N).sum()


def loss_factors(weights: Mapping[str, float], counts: Mapping[Place, float]) -> dict[str, float]:
    """weight / count per term with a nonzero weight: the factor of its sum in the loss (count 0: the weight)."""
    return {name: weight / (counts[TERMS[name].place] or 1.0) for name, weight in weights.items() if weight}


def means(sums: Mapping[str, Tensor], counts: Mapping[Place, float]) -> dict[str, Tensor]:
    """sum / count per term, in the order of the loss; a fractional count below 1 divides unchanged."""
    return {name: sums[name] / (counts[t.place] or 1.0) for name, t in TERMS.items() if name in sums}
