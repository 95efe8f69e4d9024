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
        found = [known_id(tokenizer, token) for token in COORD_TOKENS]
        missing = [token for token, known in zip(COORD_TOKENS, found, strict=True) if known is None]
        if missing:
            raise CheckpointError(
                f"tokenizer {tokenizer.name_or_path!r}: {len(missing)} of {NUM_BINS} coordinate tokens are missing "
                f"(first: {missing[0]}). Expected <|coord_0|>..<|coord_999|>; run the norm1000 stage, which adds them."
            )
        ids = [known for known in found if known is not None]
        if ids != list(range(ids[0], ids[0] + NUM_BINS)):
            raise CheckpointError(
                f"tokenizer {tokenizer.name_or_path!r}: coordinate token ids are not consecutive in order (first "
                f"{ids[0]}, last {ids[-1]}). Expected {NUM_BINS} rising ids; rebuild it from a tokenizer without them."
            )
        return cls(first_id=ids[0])


def has_coord_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has `<|coord_0|>`; then it must have all of them (see `from_tokenizer`)."""
    return known_id(tokenizer, COORD_TOKENS[0]) is not None


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of one token; raises CheckpointError if the tokenizer does not have it."""
    if (found := known_id(tokenizer, token)) is None:
        raise CheckpointError(
            f"tokenizer {tokenizer.name_or_path!r}: has no token {token!r}. Expected a Qwen3-VL tokenizer with its "
            "special tokens; take the tokenizer files from the checkpoint that the model came from."
        )
    return found


def known_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """Id of one token, or None if the tokenizer does not have it.

    `get_vocab` would make a dictionary of all 150,000 tokens, which takes a tenth of a second.
    """
    found = tokenizer.convert_tokens_to_ids(token)
    unknown = found == tokenizer.unk_token_id and token != tokenizer.unk_token
    return found if isinstance(found, int) and not unknown else None
