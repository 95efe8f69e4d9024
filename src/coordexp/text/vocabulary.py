"""The coordinate vocabulary: this module defines the token range.

K = 1000 special tokens `<|coord_0|>` .. `<|coord_999|>` have consecutive ids, so that the coordinate part of a logits
vector is `logits[first_id : first_id + 1000]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from coordexp.errors import CheckpointError
from coordexp.geometry.bins import COORD_TOKENS, NUM_BINS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class CoordVocabulary:
    """The ids of the coordinate tokens: `first_id` .. `first_id + 999`."""

    first_id: int
    count: Literal[1000] = 1000

    @property
    def end_id(self) -> int:
        """One past the last coordinate id."""
        return self.first_id + NUM_BINS

    def bin_of(self, token_id: int) -> int | None:
        """Bin of a token id, or None if it is not a coordinate token."""
        offset = token_id - self.first_id
        return offset if 0 <= offset < NUM_BINS else None

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> CoordVocabulary:
        """Find the coordinate tokens; raises CheckpointError if any is missing or the ids are not consecutive."""
        known = tokenizer.get_vocab()
        missing = [token for token in COORD_TOKENS if token not in known]
        if missing:
            raise CheckpointError(
                f"tokenizer {tokenizer.name_or_path!r}: {len(missing)} of {NUM_BINS} coordinate tokens are missing "
                f"(first: {missing[0]}). Expected <|coord_0|>..<|coord_999|>; run the norm1000 stage, which adds them."
            )
        ids = [known[token] for token in COORD_TOKENS]
        if ids != list(range(ids[0], ids[0] + NUM_BINS)):
            raise CheckpointError(
                f"tokenizer {tokenizer.name_or_path!r}: coordinate token ids are not consecutive in order (first "
                f"{ids[0]}, last {ids[-1]}). Expected {NUM_BINS} rising ids; rebuild it from a tokenizer without them."
            )
        return cls(first_id=ids[0])


def has_coord_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has `<|coord_0|>`; then it must have all of them (see `from_tokenizer`)."""
    return COORD_TOKENS[0] in tokenizer.get_vocab()


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of one token; raises CheckpointError if the tokenizer does not have it."""
    if token not in (known := tokenizer.get_vocab()):
        raise CheckpointError(
            f"tokenizer {tokenizer.name_or_path!r}: has no token {token!r}. Expected a Qwen3-VL tokenizer with its "
            "special tokens; take the tokenizer files from the checkpoint that the model came from."
        )
    return known[token]
