"""The registry of loss terms, and how terms become a loss.

A term is one function and one declaration above it:

    @term("w1", "coord")
    def wasserstein1(p_NK, q_NK): ...

The function gives one value for each slot of its place and takes, by name, what it needs of those slots: of the whole
vocabulary `token_log_odds_N` and `text_log_odds_N` (losses/vocabulary_terms.py), of the coordinate ids what
`CoordSlots` has (losses/coord_terms.py), of a box what `BoxPairs` has (losses/box_terms.py). Its weight is the
parameter `<name>_weight`; a stage has the terms whose weights its parameter blocks hold. What else is said of terms
(denominators, log rows, gradients by term, tables in documents) follows from the registry.

    loss = sum over terms of  weight * sum over slots / count of its place in the whole step

Means do not add up, sums and counts do. With one division, by the counts of all micro-batches and processes of an
optimizer step, packed == unpacked and k accumulated micro-batches == one batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from coordexp.config.block import Block

# Where a term is taken, and so what its sum is divided by:
#   text        supervised text slots, each times its weight        inner_text  the same without the close, unweighted
#   coord       coordinate slots        box  boxes        unlikely  slots with a token to push down
#   reordered   slots of coordinate tokens of the reordered annotation (channel B)
Place = Literal["text", "inner_text", "coord", "box", "unlikely", "reordered"]
OF_VOCABULARY = frozenset({"token_log_odds_N", "text_log_odds_N"})
Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the objective.

    signed: its weight may be negative, which makes it a regulariser; any other coordinate term supervises coordinates.
    """

    name: str
    place: Place
    function: Callable[..., Tensor]
    arguments: tuple[str, ...]
    signed: bool

    @property
    def sees_vocabulary(self) -> bool:
        """Whether it looks beyond the coordinate ids."""
        return not OF_VOCABULARY.isdisjoint(self.arguments)

    def values(self, slots: object) -> Tensor:
        """(N,) its value at each slot."""
        return self.function(**{name: getattr(slots, name) for name in self.arguments})


TERMS: dict[str, Term] = {}  # by name, in the order of the loss; `losses/__init__.py` imports all that declare some


def term(name: str, place: Place, *, signed: bool = False) -> Callable[[Function], Function]:
    """Declare a term; see the module's docstring."""

    def register(function: Function) -> Function:
        assert name not in TERMS, f"term {name} is declared twice"
        TERMS[name] = Term(name, place, function, tuple(inspect.signature(function).parameters), signed)
        return function

    return register


def supervises_coordinates(name: str) -> bool:
    """Whether the term teaches the coordinate tokens, which the text loss leaves out."""
    return TERMS[name].place == "coord" and not TERMS[name].signed


def term_weights(*blocks: Block) -> dict[str, float]:
    """The weight of every term that one of the parameter blocks has a key for, by name."""
    keys = {name: f"{name}_weight" for name in TERMS}
    return {
        name: float(getattr(block, key))
        for name, key in keys.items()
        for block in blocks
        if key in type(block).model_fields
    }


def computed(weights: Mapping[str, float], place: Place) -> list[Term]:
    """The terms of a place that are computed: those with a weight, and every box term, which is cheap to look at."""
    return [
        t
        for name, t in TERMS.items()
        if t.place == place and (weights.get(name) or (place == "box" and name in weights))
    ]


def at_least_float32(values: Tensor) -> Tensor:
    """float64 stays (gradient checks), everything else becomes float32: bf16 has 8 bits, too few for 1000 bins."""
    return values if values.dtype == torch.float64 else values.float()


def sum_slots(values_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Sum of per-slot values, each times its weight >= 0 (default 1); 0 with a graph for no slots."""
    if weights_N is None:
        return values_N.sum()
    weights_N = weights_N.to(values_N).detach()
    # A slot of weight 0 is absent: 0 * inf must not turn the whole sum into NaN.
    return (torch.where(weights_N > 0, values_N, torch.zeros_like(values_N)) * weights_N).sum()


def loss_factors(weights: Mapping[str, float], counts: Mapping[Place, float]) -> dict[str, float]:
    """weight / count of each term with a weight: what its sum is multiplied by in the loss (count 0: weight)."""
    return {name: weight / (counts[TERMS[name].place] or 1.0) for name, weight in weights.items() if weight}


def means(sums: Mapping[str, Tensor], counts: Mapping[Place, float]) -> dict[str, Tensor]:
    """sum / count of each term, in the order of the loss; a fractional count below 1 divides as it is."""
    return {name: sums[name] / (counts[t.place] or 1.0) for name, t in TERMS.items() if name in sums}
