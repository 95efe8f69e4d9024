"""What an answer's format lets one expect next: tokens that run together with the last one that was chosen.

A draft decides nothing. The forward that runs it says what the model would have chosen at each of its tokens, and the
first one that is refused ends it. So a draft that is often right saves forwards, and a wrong one costs no more than its
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from coordexp.text.codecs import AnswerEncoder, get_codec
from coordexp.text.grammar import Ids, Pieces


class FormatDraft:
    """The scaffold of a codec with coordinate tokens, as the training answers are written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, codec: str) -> None:
        pieces = Pieces.read(AnswerEncoder(tokenizer, get_codec(codec)))
        self._separator, self._again = pieces.separator, pieces.again
        self._opening = pieces.opening
        # An answer goes on more often than it ends: where both begin alike, the next object is expected.
        self._begun = {piece[0]: piece[1:] for piece in (pieces.stop[:-1], pieces.again, pieces.middle) if piece}

    def after(self, ids: Sequence[int], n_coords: int, ends_in_coord: bool) -> Ids:
        """Tokens that are likely to follow these of an answer, `n_coords` of them coordinates."""
        inside_box = n_coords % 4 > 0
        if ends_in_coord:
            return self._separator if inside_box else self._again
        if len(ids) == 1 and ids[0] == self._opening[0]:
            return self._opening[1:]
        return () if inside_box else self._begun.get(ids[-1], ())
