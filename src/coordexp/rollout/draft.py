"""Drafts for speculative decoding: the tokens that the answer format makes probable after the last chosen one.

As in speculative decoding (Leviathan et al. 2023, arXiv:2211.17192), a draft does not affect the answer. The forward
that runs it also gives the model's choice at each drafted token, and the first rejected token ends the draft. A draft
that is often accepted saves forwards; a wrong one costs only its own tokens. No draft model is needed, because most
tokens of an answer are scaffold.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from coordexp.text.codecs import AnswerEncoder, get_codec
from coordexp.text.grammar import Ids, Pieces


class FormatDraft:
    """Drafts the scaffold of a codec with coordinate tokens, in the form of the training answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, codec: str) -> None:
        pieces = Pieces.read(AnswerEncoder(tokenizer, get_codec(codec)))
        self._separator, self._again = pieces.separator, pieces.again
        self._opening = pieces.opening
        # If the next object and the end begin alike, draft the next object, which is more frequent.
        self._begun = {piece[0]: piece[1:] for piece in (pieces.stop[:-1], pieces.again, pieces.middle) if piece}

    def after(self, ids: Sequence[int], n_coords: int, ends_in_coord: bool) -> Ids:
        """The tokens that probably follow these tokens of an answer, `n_coords` of which are coordinates."""
        inside_box = n_coords % 4 > 0
        if ends_in_coord:
            return self._separator if inside_box else self._again
        if len(ids) == 1 and ids[0] == self._opening[0]:
            return self._opening[1:]
        return () if inside_box else self._begun.get(ids[-1], ())
