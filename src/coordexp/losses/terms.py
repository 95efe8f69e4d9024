"""The currency of all losses: an unweighted sum over slots and the count it is to be divided by.

Means do not add up, sums and counts do. Every term therefore returns both, and the one division happens in
`objective.combine`, by a count over all micro-batches and ranks. That makes packed == unpacked, and k accumulated
micro-batches == one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TermSum:
    """One term over one batch of slots (coordinate slots, text slots, or boxes).

    sum: scalar with a graph, also for zero slots (then 0). count: scalar without a graph: slots, or their weights' sum.
    """

    sum: Tensor
    count: Tensor

    def __add__(self, other: TermSum) -> TermSum:
        return TermSum(self.sum + other.sum, self.count + other.count)

    def mean(self) -> Tensor:
        """sum / count; 0 (with a graph) where there is nothing to average."""
        return self.sum / positive_or_one(self.count)


def sum_slots(values_N: Tensor, weights_N: Tensor | None = None) -> TermSum:
    """Add up per-slot values, each times its weight (default 1); the count is the sum of the weights."""
    if weights_N is None:
        return TermSum(values_N.sum(), values_N.new_tensor(float(values_N.numel())))
    weights_N = weights_N.to(values_N).detach()
    # A slot of weight 0 is absent: 0 * inf must not turn the whole sum into NaN.
    values_N = torch.where(weights_N > 0, values_N, torch.zeros_like(values_N))
    return TermSum((values_N * weights_N).sum(), weights_N.sum())


def positive_or_one(count: Tensor) -> Tensor:
    """The count as a divisor: 1 where it is 0. A count between 0 and 1 (fractional weights) divides as it is."""
    return torch.where(count > 0, count, torch.ones_like(count))
