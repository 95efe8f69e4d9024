"""Logits seen as coordinate ids and text ids: what the gate, the text gate and the diagnostics ask about.

N slots, V vocabulary, K = 1000 coordinate ids, A ids before them, B ids after them (V = A + K + B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.terms import at_least_float32


@dataclass(frozen=True, slots=True)
class VocabularyPartition:
    """float32 logits of N slots, cut into the coordinate ids and the text ids on either side of them."""

    before_NA: Tensor
    coord_NK: Tensor
    after_NB: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, first_coord_id: int) -> VocabularyPartition:
        """Cut full-vocabulary logits (N, V) at the coordinate ids `first_coord_id` .. `first_coord_id + 999`."""
        vocab_size = logits_NV.shape[-1]
        num_after = vocab_size - first_coord_id - NUM_BINS
        assert first_coord_id >= 0, f"first coordinate id {first_coord_id}: expected >= 0"
        assert num_after >= 0, f"coordinate ids {first_coord_id}.. exceed {vocab_size} logits"
        # One split, not three slices: its backward is one concatenation instead of three zero-padded (N, V) buffers.
        return cls(*at_least_float32(logits_NV).split([first_coord_id, NUM_BINS, num_after], dim=-1))

    def text_log_odds(self, temperature: float) -> Tensor:
        """(N,) log((1 - m) / m) with m = P(coordinate ids).

        The gates are log-sigmoids of it: exact where m is near 1 and the two usual log-sums would cancel.
        """
        return self._text_logsumexp(temperature) - (self.coord_NK / temperature).logsumexp(-1)

    def _text_logsumexp(self, temperature: float) -> Tensor:
        """(N,) log of the unnormalised mass on all other ids; -inf if there are none."""
        sides = [side for side in (self.before_NA, self.after_NB) if side.shape[-1]]
        if not sides:
            return torch.full_like(self.coord_NK[:, 0], -torch.inf)
        sums = [(side / temperature).logsumexp(-1) for side in sides]
        return sums[0] if len(sums) == 1 else torch.logaddexp(*sums)
