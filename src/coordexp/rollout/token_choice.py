"""Which token an answer takes next: penalty and masks on the logits, then the likeliest token or a drawn one.

The rules, and the order in which they apply, are those of transformers' logits processors.

Shapes: R answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

import torch
from torch import Tensor

from coordexp.config.schema import DecodeParams


class TokenChoice:
    """The rules of one `decode` block; `suppressed_ids` are never chosen."""

    def __init__(self, decode: DecodeParams, suppressed_ids: Sequence[int]) -> None:
        self._penalty = decode.repetition_penalty
        self._temperature = decode.temperature
        self._top_p = decode.top_p
        self._suppressed = torch.tensor(suppressed_ids)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn: then `choose` takes random numbers."""
        return self._temperature > 0

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens an answer and its prompt hold."""
        return self._penalty != 1

    def scores(self, logits_RV: Tensor, held: Sequence[Collection[int]], allowed_RT: Tensor | None = None) -> Tensor:
        """Logits (R, V) under the rules, -inf where a token must not come.

        Args:
            logits_RV: float32, of the model; they stay as they are.
            held: the different tokens of each prompt and answer so far; read if there is a penalty.
            allowed_RT: tokens that a grammar allows. It may be narrower than V: what lies beyond is forbidden.
        """
        scores_RV = logits_RV.clone()
        if self.penalizes:
            self._penalize(scores_RV, held)
        scores_RV[:, self._suppressed.to(scores_RV.device)] = -torch.inf
        if allowed_RT is not None:
            n_tokens = allowed_RT.shape[1]
            scores_RV[:, :n_tokens].masked_fill_(~allowed_RT, -torch.inf)
            scores_RV[:, n_tokens:] = -torch.inf
        if self.draws:
            scores_RV = self._nucleus(scores_RV / self._temperature)
        return scores_RV

    def choose(self, scores_RV: Tensor, uniform_R: Tensor | None) -> Tensor:
        """(R,) token ids; `uniform_R` are the numbers in [0, 1) that draw them, float32.

        What a number draws depends on its own row alone, unlike with `torch.multinomial`.
        """
        if not self.draws:
            return scores_RV.argmax(-1)
        assert uniform_R is not None
        below_RV = scores_RV.double().softmax(-1).cumsum(-1)  # in double precision, a float32 below 1 stays below
        at_R = uniform_R.to(below_RV.device, torch.float64)[:, None] * below_RV[:, -1:]
        return torch.searchsorted(below_RV, at_R, right=True)[:, 0]

    def _penalize(self, scores_RV: Tensor, held: Sequence[Collection[int]]) -> None:
        rows = [row for row, ids in enumerate(held) for _ in ids]
        at = torch.tensor(rows, device=scores_RV.device), torch.tensor([*chain(*held)], device=scores_RV.device)
        found = scores_RV[at]
        scores_RV[at] = torch.where(found < 0, found * self._penalty, found / self._penalty)

    def _nucleus(self, scores_RV: Tensor) -> Tensor:
        """Without the least likely tokens that together have at most 1 - top_p."""
        if self._top_p >= 1:
            return scores_RV
        ascending_RV, places_RV = scores_RV.sort(-1)
        drops_RV = ascending_RV.softmax(-1).cumsum(-1) <= 1 - self._top_p
        drops_RV[:, -1] = False
        return scores_RV.masked_fill(drops_RV.scatter(1, places_RV, drops_RV), -torch.inf)
