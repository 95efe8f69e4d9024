"""Answer codecs: from objects to text segments with roles, and from segments to token ids.

A codec turns objects into segments. The encoder tokenizes each segment separately and records the role of each token.
The role decides which loss a token gets, so roles are assigned once, here, and never inferred from token ids later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import ConfigError
from coordexp.geometry.bins import COORD_TOKENS
from coordexp.text.vocabulary import token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"
KNOWN_TEXTS = 1 << 16  # a bound for the caches: category names are few, but a data set may hold millions of phrases


class Role(IntEnum):
    """The function of a token in the sequence."""

    PROMPT = 0  # never supervised
    STRUCT = 1  # scaffold between objects
    DESC = 2
    COORD = 3  # one of the 1000 coordinate tokens
    NUMBER = 4  # digits of the plain-number codec
    CLOSE = 5  # closing scaffold and end-of-turn token: the decision to stop


@dataclass(frozen=True, slots=True)
class TextObject:
    """An object as it is written in text: its description and its four bins (x1, y1, x2, y2)."""

    desc: str
    bins: tuple[int, int, int, int]


class Segment(NamedTuple):
    """A piece of text with one role; `object_index` is -1 for text that belongs to no object."""

    role: Role
    text: str
    object_index: int = -1


class AnswerCodec(Protocol):
    """A text format for a set of objects."""

    @property
    def name(self) -> str:
        """Its name in the parameter `text.codec`."""
        ...

    def segments(self, objects: Sequence[TextObject]) -> list[Segment]:
        """Segments whose concatenated texts are the complete answer without the end-of-turn token."""
        ...


def _coordinate(value: int, role: Role) -> str:
    return COORD_TOKENS[value] if role is Role.COORD else str(value)


@lru_cache(maxsize=KNOWN_TEXTS)
def _json_desc(desc: str) -> str:
    return json.dumps(desc, ensure_ascii=False)[1:-1]


@dataclass(frozen=True, slots=True)
class _JsonLike:
    """One-line JSON; the JSON codecs differ in how they write a coordinate."""

    name: str
    quote: str  # around each coordinate
    role: Role

    def segments(self, objects: Sequence[TextObject]) -> list[Segment]:
        if not objects:
            return [Segment(Role.CLOSE, '{"objects": []}')]
        # The scaffold between two objects is one segment: `]}, {"desc": "` continues and `]}]}` stops. The decision to
        # stop therefore falls on one of the first tokens after the last coordinate (`stop_position`).
        opening, following = '{"objects": [{"desc": "', f'{self.quote}]}}, {{"desc": "'
        middle, between = f'", "bbox_2d": [{self.quote}', f"{self.quote}, {self.quote}"
        struct, role = Role.STRUCT, self.role
        out = []
        for i, obj in enumerate(objects):
            out.append(Segment(struct, following if i else opening, i))
            out.append(Segment(Role.DESC, _json_desc(obj.desc), i))
            for axis, value in enumerate(obj.bins):
                out.append(Segment(struct, between if axis else middle, i))
                out.append(Segment(role, _coordinate(value, role), i))
        out.append(Segment(Role.CLOSE, f"{self.quote}]}}]}}"))
        return out


@dataclass(frozen=True, slots=True)
class _Tags:
    """Qwen's own grounding tokens: `<|object_ref_start|>desc<|object_ref_end|><|box_start|>..<|box_end|>`."""

    name: str
    role: Role

    def _coordinates(self, bins: tuple[int, int, int, int], i: int) -> Iterator[Segment]:
        for axis, value in enumerate(bins):
            if axis and self.role is Role.NUMBER:
                yield Segment(Role.STRUCT, ",", i)
            yield Segment(self.role, _coordinate(value, self.role), i)

    def segments(self, objects: Sequence[TextObject]) -> list[Segment]:
        out = []
        for i, obj in enumerate(objects):
            out += [
                Segment(Role.STRUCT, "<|object_ref_start|>", i),
                Segment(Role.DESC, obj.desc, i),
                Segment(Role.STRUCT, "<|object_ref_end|><|box_start|>", i),
                *self._coordinates(obj.bins, i),
                Segment(Role.STRUCT, "<|box_end|>", i),
            ]
        return out


CODECS: dict[str, AnswerCodec] = {
    "json": _JsonLike("json", '"', Role.COORD),
    "digits": _JsonLike("digits", "", Role.NUMBER),
    "tags": _Tags("tags", Role.COORD),
}
# The scaffolds of `json` and `tags` with plain numbers. Only the pretraining of the embedded base model uses them, so
# that it has seen every scaffold token before coordinate tokens are added, as Qwen3-VL has.
NUMBER_FORMATS: dict[str, AnswerCodec] = {
    "detect": CODECS["digits"],
    "detect_quoted": _JsonLike("digits_quoted", '"', Role.NUMBER),
    "detect_tags": _Tags("digits_tags", Role.NUMBER),
}


def get_codec(name: str) -> AnswerCodec:
    """The codec with this name; raises ConfigError with the valid names."""
    if name not in CODECS:
        raise ConfigError(f"text.codec is {name!r}, expected one of {sorted(CODECS)}.")
    return CODECS[name]


def render(codec: AnswerCodec, objects: Sequence[TextObject]) -> str:
    """The answer as plain text, without the end-of-turn token."""
    return "".join(segment.text for segment in codec.segments(objects))


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """Token ids of an answer including its end-of-turn token, and the role and object (-1: none) of each token."""

    ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    object_index: NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class _Block:
    """The tokens of an object with a given description; its four coordinate tokens are at `coord_places`."""

    ids: list[int]
    roles: bytes
    coord_places: tuple[int, ...]


class AnswerEncoder:
    """Tokenizes segments one by one. Repeated texts (scaffold, descriptions) are tokenized once and cached.

    With coordinate tokens, whole objects are cached by description: encoding one copies the block and sets four ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, codec: AnswerCodec) -> None:
        self.codec = codec
        self._tokenizer = tokenizer
        self._end_id = token_id(tokenizer, END_OF_TURN)
        self._ids = lru_cache(maxsize=KNOWN_TEXTS)(self._tokenise)
        self._block = lru_cache(maxsize=KNOWN_TEXTS)(self._make_block)

    def _tokenise(self, text: str, is_data: bool) -> list[int]:
        # A description is data: special tokens spelled in it are split into ordinary tokens (no prompt injection).
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=is_data)

    def encode_segments(self, segments: Sequence[Segment], end: bool = True) -> EncodedAnswer:
        """Encode segments in order; `end` appends the end-of-turn token with role CLOSE."""
        # Tokenizing each segment separately forbids tokens that span two roles, and makes the ids of a piece
        # independent of its neighbors. They may differ from the tokens of the joined text, but decode to the same text.
        pieces = [self._ids(segment.text, segment.role is Role.DESC) for segment in segments]
        roles, owners = [segment.role for segment in segments], [segment.object_index for segment in segments]
        if end:
            pieces.append([self._end_id])
            roles.append(Role.CLOSE)
            owners.append(-1)
        lengths = [len(piece) for piece in pieces]
        return EncodedAnswer(
            np.fromiter(chain.from_iterable(pieces), np.int32, sum(lengths)),
            np.repeat(np.array(roles, np.uint8), lengths),
            np.repeat(np.array(owners, np.int16), lengths),
        )

    def encode(self, objects: Sequence[TextObject]) -> EncodedAnswer:
        """Encode a complete answer."""
        blocks = [self._block(obj.desc, i == 0) for i, obj in enumerate(objects)]
        known = [block for block in blocks if block]
        if not known or len(known) < len(blocks):
            return self.encode_segments(self.codec.segments(objects))
        ids: list[int] = []
        for obj, block in zip(objects, known, strict=True):
            start = len(ids)
            ids += block.ids
            for place, value in zip(block.coord_places, obj.bins, strict=True):
                ids[start + place] = self._first_coord_id + value
        close = self._close
        roles = b"".join([*(block.roles for block in known), close.roles.tobytes()])
        lengths = [*(len(block.ids) for block in known), len(close.ids)]
        return EncodedAnswer(
            np.array(ids + close.ids.tolist(), np.int32),
            np.frombuffer(bytearray(roles), np.uint8),  # an array over bytes would be read-only
            np.repeat(np.array([*range(len(known)), -1], np.int16), lengths),
        )

    def _make_block(self, desc: str, is_first: bool) -> _Block | None:
        """The block of a description; None if coordinates are digits, whose number varies."""
        two = self.codec.segments([TextObject(desc, (0, 0, 0, 0))] * 2)
        encoded = self.encode_segments([s for s in two if s.object_index == (0 if is_first else 1)], end=False)
        places = tuple(np.flatnonzero(encoded.roles == Role.COORD).tolist())
        return _Block(encoded.ids.tolist(), encoded.roles.tobytes(), places) if len(places) == 4 else None

    def stop_position(self, answer: EncodedAnswer) -> int:
        """Position of the stop decision in a complete answer: its first token that differs from one more object."""
        n_objects = int(answer.object_index.max(initial=-1)) + 1
        start = int(np.flatnonzero(answer.roles == Role.CLOSE)[0])
        further = self._openings[min(n_objects, 1)]
        close = answer.ids[start : start + len(further)]
        differs = np.flatnonzero(close != further[: len(close)])
        return start + (int(differs[0]) if len(differs) else len(close))

    @cached_property
    def _openings(self) -> list[NDArray[np.int32]]:
        """Tokens before the description of the first object, and before that of a later object."""
        two = self.codec.segments([TextObject("", (0, 0, 0, 0))] * 2)
        struct = [[s for s in two if s.object_index == i and s.role is Role.STRUCT][:1] for i in (0, 1)]
        return [self.encode_segments(segments, end=False).ids for segments in struct]

    @cached_property
    def _first_coord_id(self) -> int:
        return token_id(self._tokenizer, COORD_TOKENS[0])

    @cached_property
    def _close(self) -> EncodedAnswer:
        """The tokens after the last object."""
        one = self.codec.segments([TextObject("", (0, 0, 0, 0))])
        return self.encode_segments([s for s in one if s.object_index < 0])
