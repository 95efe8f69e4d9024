"""The answer's grammar as a logits processor of Hugging Face `generate`.

Shapes: B rows, T tokens so far, V logits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from coordexp.text.grammar import AnswerGrammar
from coordexp.text.grammar_walk import AnswerWalk


class GrammarProcessor(LogitsProcessor):
    """Masks what the walks of the rows do not allow; one for each `generate`, whose prompts have `prompt_length`."""

    def __init__(self, grammar: AnswerGrammar, n_rows: int, prompt_length: int) -> None:
        self._walks = [AnswerWalk(grammar) for _ in range(n_rows)]
        self._taken = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with the logits of forbidden tokens at -inf; rows that ended may only end."""
        for token_ids in input_ids[:, self._taken :].T.tolist():
            for walk, token_id in zip(self._walks, token_ids, strict=True):
                walk.advance(token_id)
        self._taken = input_ids.shape[1]
        allowed = np.stack([walk.allowed() for walk in self._walks])
        masked = torch.full_like(scores, -torch.inf)
        mask = torch.from_numpy(allowed).to(scores.device)
        # The embedding may have more rows than the tokenizer has tokens: those stay forbidden.
        n_tokens = mask.shape[1]
        masked[:, :n_tokens] = scores[:, :n_tokens].masked_fill(~mask, -torch.inf)
        return masked
