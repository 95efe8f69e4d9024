"""The choice of the next token: penalty and masks on the logits, then argmax or sampling.

The rules and their order are those of transformers' logits processors. The repetition penalty is that of CTRL (Keskar
et al. 2019, arXiv:1909.05858, section 4.1), top_p that of nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).

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
        """Whether tokens are sampled, so that `choose` needs random numbers."""
        return self._temperature > 0

    @property
    def penalizes(self) -> bool:
        """Whether there is a penalty on tokens that the prompt or answer already contains."""
        return self._penalty != 1

    def scores(self, logits_RV: Tensor, held: Sequence[Collection[int]], allowed_RT: Tensor | None = None) -> Tensor:
        """(R, V) logits under the rules, -inf for forbidden tokens.

        Args:
            logits_RV: logits of the model in float32; not modified.
            held: the distinct tokens of each prompt and answer so far; used if there is a penalty.
            allowed_RT: tokens that the grammar allows. If it is narrower than V, the remaining tokens are forbidden.
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
        """(R,) token ids; `uniform_R` are float32 random numbers in [0, 1), one per row.

        Inverse transform sampling: the token of a row depends on its own random number alone, so an answer does not
        depend on the other answers of its batch. `torch.multinomial` does not have this property.
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
        """Mask the least probable tokens whose total probability is at most 1 - top_p."""
        if self._top_p >= 1:
            return scores_RV
        ascending_RV, places_RV = scores_RV.sort(-1)
        drops_RV = ascending_RV.softmax(-1).cumsum(-1) <= 1 - self._top_p
        drops_RV[:, -1] = False
        return scores_RV.masked_fill(drops_RV.scatter(1, places_RV, drops_RV), -torch.inf)
