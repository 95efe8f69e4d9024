"""Token ids as a string of symbols: the input of the strict parser, instead of decoded text.

Every coordinate token becomes one private-use character, U+E000 + bin, and every special token one reserved character
above those. Text tokens become their UTF-8 text. The parser therefore recognizes coordinates by token id: text that
merely spells `<|coord_5|>` stays a run of ordinary characters. Each character maps to the token it came from.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import CheckpointError
from coordexp.geometry.bins import NUM_BINS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from coordexp.text.vocabulary import CoordVocabulary

# The private-use area of the Basic Multilingual Plane. In generated text it is replaced, so that no text can imitate a
# token.
PRIVATE_FIRST, PRIVATE_LAST = 0xE000, 0xF8FF
FIRST_COORD = PRIVATE_FIRST
REF_START, REF_END, BOX_START, BOX_END, END, OTHER = map(chr, range(FIRST_COORD + NUM_BINS, FIRST_COORD + NUM_BINS + 6))
MARKERS: dict[str, str] = {
    "<|object_ref_start|>": REF_START,
    "<|object_ref_end|>": REF_END,
    "<|box_start|>": BOX_START,
    "<|box_end|>": BOX_END,
    "<|im_end|>": END,
    "<|endoftext|>": END,
}
COORD_SYMBOL = re.compile(f"[{chr(FIRST_COORD)}-{chr(FIRST_COORD + NUM_BINS - 1)}]")
RESERVED_SYMBOL = re.compile(f"[{chr(PRIVATE_FIRST)}-{chr(PRIVATE_LAST)}]")

_REPLACEMENT = 0xFFFD
_SIZED_REPLACE = "coordexp.sized_replace"
_SIZE_BASE = 0xDC00


def _replace_keeping_size(error: UnicodeError) -> tuple[str, int]:
    """As errors='replace', but each replacement encodes the number of bytes it replaces.

    The replacement is a surrogate, which cannot occur in valid UTF-8, so it is never confused with text.
    """
    assert isinstance(error, UnicodeDecodeError)
    return chr(_SIZE_BASE + error.end - error.start), error.end


codecs.register_error(_SIZED_REPLACE, _replace_keeping_size)


@dataclass(frozen=True, slots=True, eq=False)
class SymbolText:
    """Symbols of an answer, and for each character the index of the token with its first byte."""

    text: str
    token_of: list[int]

    def token_span(self, start: int, end: int) -> tuple[int, int]:
        """Token range [first, last + 1) of the characters start..end-1; the range must not be empty."""
        return self.token_of[start], self.token_of[end - 1] + 1


@dataclass(frozen=True, slots=True, eq=False)
class TokenTable:
    """For each token id, its bytes and whether they are a reserved character instead of text.

    `texts` has the symbols of each token that do not depend on its context. It is None for a token with a part of a
    character, which its neighbors complete, or with a character that imitates a token. The last entry of each field is
    used for every id that the tokenizer does not know.
    """

    pieces: tuple[bytes, ...]
    is_reserved: NDArray[np.bool_]
    texts: tuple[str | None, ...]

    @classmethod
    def build(cls, pieces: Sequence[bytes | str]) -> TokenTable:
        """Build a table from one piece per id: bytes are text, a str is a reserved character."""
        closed = [*pieces, OTHER]
        encoded = tuple(piece.encode() if isinstance(piece, str) else piece for piece in closed)
        texts = tuple(piece if isinstance(piece, str) else _symbols_alone(piece) for piece in closed)
        return cls(encoded, np.array([isinstance(piece, str) for piece in closed]), texts)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, coord: CoordVocabulary | None) -> TokenTable:
        """Read a byte-level BPE tokenizer; `coord` is None for a model without coordinate tokens.

        Raises:
            CheckpointError: a token is not written in the byte-level alphabet.
        """
        vocabulary = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        byte_of = _byte_of_char()
        pieces: list[bytes | str] = [OTHER] * (max(vocabulary.values()) + 1)
        for token, token_id in vocabulary.items():
            bin_index = None if coord is None else coord.bin_of(token_id)
            if bin_index is not None:
                pieces[token_id] = chr(FIRST_COORD + bin_index)
            elif token in MARKERS:
                pieces[token_id] = MARKERS[token]
            elif token_id in added:
                pieces[token_id] = OTHER if added[token_id].special else token.encode()
            else:
                pieces[token_id] = _token_bytes(token, byte_of, tokenizer.name_or_path)
        return cls.build(pieces)

    def symbols(self, token_ids: Sequence[int] | NDArray[np.integer]) -> SymbolText:
        """Turn generated ids into symbols; ids outside the table become a reserved character."""
        ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
        unknown = len(self.pieces) - 1
        if len(ids) and not 0 <= ids.min() <= ids.max() < unknown:
            ids = np.where((ids >= 0) & (ids < unknown), ids, unknown)
        texts = [self.texts[i] for i in ids.tolist()]
        if None in texts:
            return self._symbols_of_bytes(ids)
        whole = cast(list[str], texts)
        return SymbolText("".join(whole), np.repeat(np.arange(len(ids)), list(map(len, whole))).tolist())

    def _symbols_of_bytes(self, ids: NDArray[np.int64]) -> SymbolText:
        """`symbols` for the rare case of characters that are split over tokens, invalid, or forged."""
        pieces = [self.pieces[i] for i in ids.tolist()]
        token_of_byte = np.repeat(np.arange(len(ids)), np.fromiter(map(len, pieces), np.int64, len(pieces)))
        # Reserved characters begin with a UTF-8 lead byte, so one decode of all bytes equals decoding run by run.
        decoded = b"".join(pieces).decode("utf-8", _SIZED_REPLACE)
        code = np.frombuffer(decoded.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)
        # The number of UTF-8 bytes of each character, or of the invalid bytes that a replacement covers, gives the byte
        # offset and with it the token of each character.
        is_broken = (code >= _SIZE_BASE) & (code < PRIVATE_FIRST)
        n_bytes = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
        n_bytes = np.where(is_broken, code - _SIZE_BASE, n_bytes)
        token_of = token_of_byte[np.cumsum(n_bytes) - n_bytes]
        # Private-use characters that come from text tokens, not from the table, are forged.
        is_private = (code >= PRIVATE_FIRST) & (code <= PRIVATE_LAST)
        is_forged = is_private & ~self.is_reserved[ids[token_of]]
        shown = np.where(is_broken | is_forged, _REPLACEMENT, code)
        return SymbolText(shown.astype("<u4").tobytes().decode("utf-32-le"), token_of.tolist())


def _symbols_alone(piece: bytes) -> str | None:
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    return None if RESERVED_SYMBOL.search(text) else text


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet of GPT-2 (Radford et al. 2019): printable Latin-1 stays, other bytes are shifted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(shifted)}


def _token_bytes(token: str, byte_of: dict[str, int], where: str) -> bytes:
    try:
        return bytes([byte_of[char] for char in token])
    except KeyError as error:
        raise CheckpointError(
            f"tokenizer {where!r}: token {token!r} has {error.args[0]!r}, which is not in the byte-level alphabet. "
            "Expected a byte-level BPE tokenizer, such as Qwen's; other kinds cannot be parsed token by token."
        ) from error
