"""The grammar of an answer over token ids, shared by all engines, for constrained decoding.

    answer  = empty end | opening object (again object)* stop end
    object  = name middle value (separator value){3}

Constrained decoding masks the tokens that the grammar does not allow next (Willard and Louf, arXiv:2307.09702). The
pieces are the codec's segments in the tokenizer's own (canonical) tokens, so that a constrained answer has the same
tokens as a training answer. Other tokenizations of the same text would be out of distribution for the model.

A walk (grammar_walk.py) also tracks what was emitted. It can therefore enforce rules that a context-free grammar cannot
express: ordered corners, no duplicates, a bounded name, and a complete answer within the token budget. Its output
always parses.

Shapes: V tokens of the vocabulary, K values of a coordinate.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coordexp.config.schema import DecodeParams
from coordexp.errors import ConfigError
from coordexp.geometry.bins import NUM_BINS
from coordexp.text.codecs import AnswerEncoder, Role, Segment, TextObject, get_codec
from coordexp.text.parser import MAX_NUMBER
from coordexp.text.symbols import TokenTable
from coordexp.text.vocabulary import CoordVocabulary, has_coord_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NAME_TOKENS = 32
NO_DUPLICATE_GUARD = 1.0  # disables the check: no IoU exceeds 1

Ids = tuple[int, ...]

_VALUE_ROLES = (Role.COORD, Role.NUMBER)
_PROBES = (TextObject("a", (1, 2, 3, 4)), TextObject("b", (1, 2, 3, 4)))
UTF8_RESERVE = 3  # maximum number of missing bytes of a name's last UTF-8 character
# Lead bytes of non-ASCII white space. A name must not start with an incomplete one: it could turn out to be blank.
_BLANK_LEADS = b"\xc2\xe1\xe2\xe3"
_JSON_UNSAFE = set(range(0x20)) | set(b'"\\')
_TAGS_UNSAFE = set(range(0x20))


@dataclass(frozen=True, slots=True)
class Pieces:
    """The token ids between names and values; `stop` and `empty` include the end-of-turn token."""

    empty: Ids
    opening: Ids
    middle: Ids
    separator: Ids
    again: Ids
    stop: Ids

    @classmethod
    def read(cls, encoder: AnswerEncoder) -> Pieces:
        """Extract the pieces from an encoded pair of objects."""
        runs: list[list[int]] = [[]]
        for segment in encoder.codec.segments(_PROBES):
            if segment.role is Role.DESC or segment.role in _VALUE_ROLES:
                runs.append([])
            else:
                runs[-1] += encoder.encode_segments([segment], end=False).ids.tolist()
        # Two probe objects show every piece once:
        # opening name middle v s v s v s v again name middle v s v s v s v stop
        opening, middle, separator, again, stop = (tuple(runs[i]) for i in (0, 1, 2, 5, 10))
        end = tuple(encoder.encode_segments([]).ids.tolist())
        return cls(tuple(encoder.encode([]).ids.tolist()), opening, middle, separator, again, stop + end)


class AnswerGrammar:
    """The grammar for one tokenizer, codec and `decode` block; `AnswerWalk` tracks one answer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, codec: str, decode: DecodeParams, names: Sequence[str] = ()
    ) -> None:
        """Build the grammar; with `grammar: closed`, only the category names in `names` are allowed.

        Raises:
            ConfigError: the token budget is too small for one object, or the closed list of names is empty.
        """
        assert decode.grammar != "none"
        encoder = AnswerEncoder(tokenizer, get_codec(codec))
        coord = CoordVocabulary.from_tokenizer(tokenizer) if has_coord_tokens(tokenizer) else None
        table = TokenTable.from_tokenizer(tokenizer, coord)
        self.decode = decode
        self.pieces = Pieces.read(encoder)
        self.n_tokens = len(table.pieces) - 1  # the last one stands for unknown ids
        self.end_id = self.pieces.stop[-1]
        self.values = _value_ids(encoder)
        self.value_cost = max(map(len, self.values))
        self._table = table
        self._unsafe = _TAGS_UNSAFE if encoder.codec.name == "tags" else _JSON_UNSAFE
        self._continuations: dict[bytes, NDArray[np.bool_]] = {}
        self._next_of_value: dict[Ids, NDArray[np.int64]] = {}
        self.names = _name_ids(encoder, names) if decode.grammar == "closed" else None
        if self.costs_from_start > decode.max_new_tokens:
            raise ConfigError(
                f"decode.max_new_tokens is {decode.max_new_tokens}, but the shortest answer with an object takes "
                f"{self.costs_from_start} tokens with decode.grammar; increase it."
            )

    def cost_after_value(self, axis: int) -> int:
        """Upper bound of the tokens needed to end the answer after the value of this axis (0..3) is written."""
        return (3 - axis) * (len(self.pieces.separator) + self.value_cost) + len(self.pieces.stop)

    @cached_property
    def cost_after_middle(self) -> int:
        """As `cost_after_value`, before the first value."""
        return self.value_cost + self.cost_after_value(0)

    @cached_property
    def cost_of_name(self) -> int:
        """Upper bound of the tokens needed for the shortest name and everything after it."""
        shortest = 1 + UTF8_RESERVE if self.names is None else min(map(len, self.names.values()))
        return shortest + len(self.pieces.middle) + self.cost_after_middle

    @property
    def costs_from_start(self) -> int:
        """As `cost_of_name`, from the first token."""
        return len(self.pieces.opening) + self.cost_of_name

    def bytes_of(self, token_id: int) -> bytes:
        """The text of a token."""
        return self._table.pieces[token_id]

    @cached_property
    def first_of_name(self) -> NDArray[np.bool_]:
        """Tokens that may start a free name because they contain a visible character, (V,)."""
        return np.array([ok and _is_visible(self.bytes_of(i)) for i, ok in enumerate(self.after_tail(b""))])

    def after_tail(self, tail: bytes) -> NDArray[np.bool_]:
        """Tokens that may follow inside a free name that ends with these bytes of an incomplete character, (V,)."""
        # A byte-level token may end within a UTF-8 character. Only tokens that continue the incomplete character are
        # allowed then, so that the answer is always valid UTF-8. There are few possible tails, so masks are cached.
        if tail not in self._continuations:
            allowed = np.zeros(self.n_tokens, dtype=bool)
            for i in self._plain_tokens if not tail else self._continuing_tokens:
                allowed[i] = utf8_tail(tail + self.bytes_of(i)) is not None
            self._continuations[tail] = allowed
        return self._continuations[tail]

    @cached_property
    def single_bytes(self) -> NDArray[np.bool_]:
        """Tokens of one continuation byte: they complete a character without starting another, (V,)."""
        allowed = np.zeros(self.n_tokens, dtype=bool)
        allowed[[i for i in self._continuing_tokens if len(self.bytes_of(i)) == 1]] = True
        return allowed

    def to_lark(self) -> str:
        """The grammar in Lark syntax with token ids, as vLLM servers accept it.

        It covers what a context-free grammar can express; corners, duplicates and the budget need a walk. A free name
        is a sequence of tokens of whole characters, the first of which is visible. The end-of-turn token is not in the
        grammar: servers allow it where the grammar is complete, and reject a grammar that contains it.
        """
        pieces, values = self.pieces, sorted(set(self.values))
        if self.names is None:
            whole = [i for i in np.flatnonzero(self.after_tail(b"")).tolist() if utf8_tail(self.bytes_of(i)) == b""]
            first = [i for i in whole if self.first_of_name[i]]
            name = f"name: first rest{{0,{MAX_NAME_TOKENS - 1}}}\nfirst: {_choice(first)}\nrest: {_choice(whole)}"
        else:
            name = "name: " + " | ".join(map(_run, self.names.values()))
        is_token = all(len(ids) == 1 for ids in values)
        value = _choice([ids[0] for ids in values]) if is_token else " | ".join(map(_run, values))
        box = f" {_run(pieces.separator)} ".join(["value"] * 4)
        rules = [
            f"start: {_run(pieces.empty[:-1])} | {_run(pieces.opening)} object "
            f"({_run(pieces.again)} object)* {_run(pieces.stop[:-1])}",
            f"object: name {_run(pieces.middle)} {box}",
            name,
            f"value: {value}",
        ]
        return "\n".join(rules) + "\n"

    @cached_property
    def _plain_tokens(self) -> list[int]:
        reserved = self._table.is_reserved
        pieces = ((i, self.bytes_of(i)) for i in range(self.n_tokens))
        return [i for i, piece in pieces if piece and not reserved[i] and self._unsafe.isdisjoint(piece)]

    @cached_property
    def _continuing_tokens(self) -> list[int]:
        return [i for i in self._plain_tokens if 0x80 <= self.bytes_of(i)[0] < 0xC0]

    def next_of_value(self, prefix: Ids) -> NDArray[np.int64]:
        """For each value, the token after this prefix; -1 if the value has another prefix or ends there, (K,)."""
        if prefix not in self._next_of_value:
            n = len(prefix)
            following = [ids[n] if ids[:n] == prefix and len(ids) > n else -1 for ids in self.values]
            self._next_of_value[prefix] = np.array(following, np.int64)
        return self._next_of_value[prefix]

    @cached_property
    def value_of(self) -> dict[Ids, int]:
        """Map from the token ids of a complete value to the value."""
        return {ids: value for value, ids in enumerate(self.values)}


def _value_ids(encoder: AnswerEncoder) -> tuple[Ids, ...]:
    role = next(s.role for s in encoder.codec.segments(_PROBES) if s.role in _VALUE_ROLES)
    n_values = NUM_BINS if role is Role.COORD else MAX_NUMBER + 1

    def ids(value: int) -> Ids:
        probe = encoder.codec.segments([TextObject("a", (value, value, value, value))])
        segment = next(s for s in probe if s.role is role)
        return tuple(encoder.encode_segments([segment], end=False).ids.tolist())

    return tuple(ids(value) for value in range(n_values))


def _name_ids(encoder: AnswerEncoder, names: Sequence[str]) -> dict[str, Ids]:
    if not names or not all(name.strip() for name in names):
        raise ConfigError(
            f"the closed list of names is {list(names)!r}; expected at least one name, and no empty names."
        )
    encoded = {}
    for name in names:
        segments = encoder.codec.segments([TextObject(name, (1, 2, 3, 4))])
        encoded[name] = tuple(_desc_ids(encoder, segments))
    return encoded


def _desc_ids(encoder: AnswerEncoder, segments: Sequence[Segment]) -> list[int]:
    desc = next(s for s in segments if s.role is Role.DESC)
    return encoder.encode_segments([desc], end=False).ids.tolist()


def _run(ids: Ids) -> str:
    """A sequence of tokens in Lark syntax."""
    return " ".join(f"<[{i}]>" for i in ids)


def _choice(ids: Sequence[int]) -> str:
    """An alternative of tokens in Lark syntax, written as ranges."""
    ordered = np.unique(np.asarray(ids, np.int64))
    ranges = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return "<[" + ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges) + "]>"


def utf8_tail(text: bytes) -> bytes | None:
    """The bytes of the incomplete last character of a UTF-8 prefix; None if the text is not a valid prefix."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(text)
    except UnicodeDecodeError:
        return None
    tail = decoder.getstate()[0]
    # Python rejects an encoded surrogate (ED A0..BF xx) only at its third byte; reject it at the second.
    return None if tail[:1] == b"\xed" and tail[1:] >= b"\xa0" else tail


def _is_visible(piece: bytes) -> bool:
    """Whether a name that starts with this piece cannot become blank."""
    tail = utf8_tail(piece)
    assert tail is not None
    return bool(piece[: len(piece) - len(tail)].decode().strip()) or (bool(tail) and tail[0] not in _BLANK_LEADS)
