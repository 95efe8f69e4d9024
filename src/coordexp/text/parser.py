"""The strict parser: from generated token ids to objects, with one reason for everything it drops.

The parser is deterministic. It repairs nothing, guesses nothing, never raises on model output, and takes time linear
in the length of the answer.

* The container is the first `{"objects": [` (JSON codecs) or the answer itself (tags). Text before it, after its end
  and after the end-of-turn token is ignored.
* Each object is first delimited (by counting brackets outside strings) and then checked, so an invalid object does not
  affect the others.
* JSON only: if the punctuation between objects or the brackets of an object are wrong, the rest cannot be delimited
  without guessing. It counts as one `malformed` object, and parsing ends there.
* An object that the end of the answer cuts off is neither returned nor counted as dropped. So more tokens never change
  the result for an earlier object. `truncated` means that an open answer was never closed.

Reasons, in the order in which they are tested (the characters of desc are tested just before bbox_invalid):

    malformed          not a valid JSON object (tags: not a valid record), or text that is not valid Unicode
    key_invalid        a repeated key, a key other than desc and bbox_2d, or a desc that contains special tokens
                       (or, as escapes, the private-use characters that represent them here)
    poly_unsupported   geometry `poly`: part of the record contract, not of the answer
    unknown_geom       another kind of geometry, such as `line` or `bbox_3d`
    missing_desc       no desc, an empty desc, or a desc that is not a string
    missing_geom       no bbox_2d
    wrong_arity        bbox_2d is not a list of exactly 4 values
    non_coord_token    a value is not exactly one coordinate token (digits codec: not an integer)
    dropped_ambiguous  the object's span has more or fewer coordinate tokens than its box has values
    bbox_invalid       x2 <= x1 or y2 <= y1, or out of range
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordexp.geometry.bins import NUM_BINS
from coordexp.records.gt_vs_pred import ParseReport
from coordexp.records.schema import REMOVED_GEOMETRY
from coordexp.text.codecs import get_codec
from coordexp.text.symbols import (
    BOX_END,
    BOX_START,
    COORD_SYMBOL,
    END,
    FIRST_COORD,
    REF_END,
    REF_START,
    RESERVED_SYMBOL,
    SymbolText,
    TokenTable,
)

DROP_REASONS = (
    "malformed",
    "key_invalid",
    "poly_unsupported",
    "unknown_geom",
    "missing_desc",
    "missing_geom",
    "wrong_arity",
    "non_coord_token",
    "dropped_ambiguous",
    "bbox_invalid",
)
MAX_NUMBER = NUM_BINS  # plain numbers range from 0 to 1000, as Qwen3-VL writes them; coordinate tokens from 0 to 999

_OBJECT_KEYS = {"desc", "bbox_2d"}
_OTHER_GEOMETRY = REMOVED_GEOMETRY | {"bbox_3d", "point", "point_2d", "points", "segmentation"}
# A valid object has two levels. Much deeper ones are rejected unread: the json module recurses and would overflow.
_MAX_DEPTH = 16
_CONTAINER = re.compile(r'\{[ \t\n\r]*"objects"[ \t\n\r]*:[ \t\n\r]*\[')
_CLOSING = re.compile(r"\][ \t\n\r]*\}")
_SPACE = re.compile(r"[ \t\n\r]*")
_STRUCTURAL = re.compile(r'["{}\[\]]')
_STRING_STOP = re.compile(r'["\\]')
_NUMBER = re.compile(r"\d+")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Objects exactly as the codecs write them: the common case, matched by one regular expression. The possessive `++`
# never backtracks, so a match stays linear in the length of the desc.
_PLAIN_DESC = r'([^"\\\x00-\x1f\ud800-\udfff\ue000-\uf8ff]++)'
_COORD = f"({COORD_SYMBOL.pattern})"
_PLAIN_OBJECT = re.compile(
    rf'\{{"desc": "{_PLAIN_DESC}", "bbox_2d": \["{_COORD}", "{_COORD}", "{_COORD}", "{_COORD}"\]\}}'
)
_PLAIN_RECORD = re.compile(f"{REF_START}{_PLAIN_DESC}{REF_END}{BOX_START}{_COORD * 4}{BOX_END}")
_TAG_EDGE = re.compile(f"[{REF_START}{BOX_START}{BOX_END}]")
_TAG_OBJECT = re.compile(f"{REF_START}([^{REF_END}]*){REF_END}{BOX_START}([^{BOX_END}]*){BOX_END}")


@dataclass(frozen=True, slots=True)
class ParsedObject:
    """A valid object. Token indices count from the first generated token; spans are [start, end).

    `bins` are the emitted values (digits codec: 0..1000). `coord_positions` are the tokens of x1, y1, x2, y2 (digits
    codec: the token of each first digit). A token that crosses a boundary belongs to the spans on both sides.
    """

    desc: str
    bins: tuple[int, int, int, int]
    coord_positions: tuple[int, int, int, int]
    desc_span: tuple[int, int]
    object_span: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """The valid objects in the order of generation, and the report on the rest."""

    objects: tuple[ParsedObject, ...]
    report: ParseReport


def parse_answer(token_ids: Sequence[int] | NDArray[np.integer], table: TokenTable, codec: str) -> ParsedAnswer:
    """Parse the generated ids of one answer, without the prompt and with or without the end-of-turn token.

    Args:
        token_ids: the generated ids; any ids are accepted.
        table: built from the model's tokenizer.
        codec: "json", "digits" or "tags".

    Raises:
        ConfigError: the codec is unknown. No content of `token_ids` raises.
    """
    walk = _WALKS[get_codec(codec).name]
    symbols = table.symbols(token_ids)
    text = symbols.text.partition(END)[0]
    return walk(SymbolText(text, symbols.token_of[: len(text)]))


class _Drop(Exception):
    """The reason why the current object is invalid."""

    def __init__(self, reason: str) -> None:
        assert reason in DROP_REASONS
        self.reason = reason


@dataclass(slots=True)
class _Tally:
    objects: list[ParsedObject] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def take(self, check: Callable[..., ParsedObject], *args: Any) -> None:
        try:
            self.objects.append(check(*args))
        except _Drop as drop:
            self.dropped[drop.reason] += 1

    def answer(self, container_found: bool, truncated: bool) -> ParsedAnswer:
        report = ParseReport(container_found, len(self.objects), dict(self.dropped), truncated)
        return ParsedAnswer(tuple(self.objects), report)


# JSON: coordinate tokens as strings, or plain integers


@dataclass(frozen=True, slots=True)
class _Span:
    """The extent of one object in the text, found by its brackets alone. All positions are characters."""

    start: int
    end: int  # one past its last bracket, or the first character that breaks it
    strings: list[tuple[int, int]]  # the contents of the strings at the top level of the object
    list_start: int  # start of its first list, -1 without one
    depth: int  # maximum nesting depth; 0 if the brackets do not match


_CoordReader = Callable[[SymbolText, _Span, list[Any]], tuple[list[int], list[int]]]


def _walk_json(
    symbols: SymbolText, read_coords: _CoordReader, plain_object: re.Pattern[str] | None = None
) -> ParsedAnswer:
    # `position` only moves forward, one object per iteration: the walk is a single pass over the text.
    text, tally = symbols.text, _Tally()
    container = _CONTAINER.search(text)
    if container is None:
        return tally.answer(container_found=False, truncated=False)
    position = _skip_space(text, container.end())
    expects_object = not text.startswith("]", position)
    while expects_object:
        if plain_object and (plain := plain_object.match(text, position)):
            tally.take(_check_plain, symbols, plain)
            is_whole, position = True, plain.end()
        else:
            span = _scan_object(text, position)
            if span is None:
                break
            tally.take(_check_json, symbols, span, read_coords)
            is_whole, position = span.depth > 0, span.end
        position = _skip_space(text, position)
        expects_object = is_whole and text.startswith(",", position)
        if expects_object:
            position = _skip_space(text, position + 1)
        elif is_whole and position < len(text) and text[position] != "]":
            tally.dropped["malformed"] += 1
    return tally.answer(container_found=True, truncated=_CLOSING.match(text, position) is None)


def _check_plain(symbols: SymbolText, plain: re.Match[str]) -> ParsedObject:
    desc, *coords = plain.groups()
    if not desc.strip():
        raise _Drop("missing_desc")
    bins, coord_chars = [ord(coord) - FIRST_COORD for coord in coords], [plain.start(i) for i in range(2, 6)]
    return _finish(symbols, desc, plain.span(1), bins, coord_chars, plain.span())


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _scan_object(text: str, start: int) -> _Span | None:
    """Find the end of the object that starts at `start`; None if the text ends first.

    A pushdown automaton over brackets and quotes, which jumps from one structural character to the next. It does not
    need the object to be valid JSON: this way an invalid object still has an end, and the next one can be read.
    """
    if start < len(text) and text[start] != "{":
        return _Span(start, start, [], -1, 0)
    open_brackets: list[str] = []
    strings: list[tuple[int, int]] = []
    position, list_start, depth = start, -1, 0
    while match := _STRUCTURAL.search(text, position):
        char, position = match[0], match.end()
        if char == '"':
            closing_quote = _find_closing_quote(text, position)
            if closing_quote is None:
                return None
            if len(open_brackets) == 1:
                strings.append((position, closing_quote))
            position = closing_quote + 1
        elif char in "{[":
            open_brackets.append(char)
            depth = max(depth, len(open_brackets))
            if char == "[" and list_start < 0:
                list_start = match.start()
        elif open_brackets.pop() + char not in ("{}", "[]"):
            return _Span(start, match.start(), strings, list_start, 0)
        if not open_brackets:
            return _Span(start, position, strings, list_start, depth)
    return None


def _find_closing_quote(text: str, position: int) -> int | None:
    while match := _STRING_STOP.search(text, position):
        if match[0] == '"':
            return match.start()
        position = match.end() + 1  # skip the escaped character
    return None


def _check_json(symbols: SymbolText, span: _Span, read_coords: _CoordReader) -> ParsedObject:
    pairs = _load_object(symbols.text, span)
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise _Drop("key_invalid")
    if "poly" in keys:
        raise _Drop("poly_unsupported")
    if not _OTHER_GEOMETRY.isdisjoint(keys):
        raise _Drop("unknown_geom")
    if not _OBJECT_KEYS.issuperset(keys):
        raise _Drop("key_invalid")
    fields = dict(pairs)
    desc = fields.get("desc")
    if not isinstance(desc, str) or not desc.strip():
        raise _Drop("missing_desc")
    if "bbox_2d" not in fields:
        raise _Drop("missing_geom")
    values = fields["bbox_2d"]
    if not isinstance(values, list) or len(values) != 4:
        raise _Drop("wrong_arity")
    bins, coord_chars = read_coords(symbols, span, values)
    # The strings at the top level are the two keys and the desc, each key before its value.
    desc_chars = span.strings[keys.index("desc") + 1]
    return _finish(symbols, desc, desc_chars, bins, coord_chars, (span.start, span.end))


def _load_object(text: str, span: _Span) -> tuple[tuple[str, Any], ...]:
    if not 0 < span.depth <= _MAX_DEPTH:
        raise _Drop("malformed")
    try:
        return _DECODER.decode(text[span.start : span.end])
    except ValueError as error:
        raise _Drop("malformed") from error


def _bounded_int(digits: str) -> int:
    # A longer number is out of range in any case, and int() would take quadratic time or raise an error.
    return int(digits) if len(digits) <= len(str(MAX_NUMBER)) else -1


def _no_integer(_: str) -> None:
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=tuple, parse_int=_bounded_int, parse_float=_no_integer, parse_constant=_refuse_constant
)


def _read_coord_tokens(symbols: SymbolText, span: _Span, values: list[Any]) -> tuple[list[int], list[int]]:
    if not all(isinstance(value, str) and COORD_SYMBOL.fullmatch(value) for value in values):
        raise _Drop("non_coord_token")
    chars = [match.start() for match in COORD_SYMBOL.finditer(symbols.text, span.start, span.end)]
    if len(chars) != len(values):
        raise _Drop("dropped_ambiguous")
    return [ord(value) - FIRST_COORD for value in values], chars


def _read_integers(symbols: SymbolText, span: _Span, values: list[Any]) -> tuple[list[int], list[int]]:
    if not all(type(value) is int for value in values):  # bool is a subclass of int, but `true` is not a coordinate
        raise _Drop("non_coord_token")
    numbers = _NUMBER.finditer(symbols.text, span.list_start, span.end)
    return values, [match.start() for match in islice(numbers, len(values))]


# Tags: records between the tokenizer's own markers


def _walk_tags(symbols: SymbolText) -> ParsedAnswer:
    """Walk the records. A record starts at its first marker, and ends at `<|box_end|>` or where the next one starts."""
    text, tally = symbols.text, _Tally()
    if _TAG_EDGE.search(text) is None:
        return tally.answer(container_found=not text.strip(), truncated=False)
    start: int | None = None  # start of the open record
    done = 0  # end of the last record
    while plain := _PLAIN_RECORD.match(text, done):
        tally.take(_check_plain, symbols, plain)
        done = plain.end()
    for edge in _TAG_EDGE.finditer(text, done):
        if start is not None and edge[0] != BOX_START:
            done = edge.end() if edge[0] == BOX_END else edge.start()
            tally.take(_check_tags, symbols, start, done)
            start = None
        if start is None and edge[0] != BOX_END:
            _count_stray(text[done : edge.start()], tally)
            start = edge.start()
    if start is None:
        _count_stray(text[done:], tally)
    return tally.answer(container_found=True, truncated=start is not None)


def _count_stray(text: str, tally: _Tally) -> None:
    if text.strip():
        tally.dropped["malformed"] += 1


def _check_tags(symbols: SymbolText, start: int, end: int) -> ParsedObject:
    record = symbols.text[start:end]
    if record[0] == BOX_START:
        raise _Drop("missing_desc")
    if BOX_START not in record:
        raise _Drop("missing_geom" if REF_END in record else "malformed")
    match = _TAG_OBJECT.fullmatch(symbols.text, start, end)
    if match is None:
        raise _Drop("malformed")
    desc, box = match.groups()
    if not desc.strip():
        raise _Drop("missing_desc")
    chars = [coord.start() for coord in COORD_SYMBOL.finditer(symbols.text, *match.span(2))]
    if len(chars) < len(box):
        raise _Drop("non_coord_token")
    if len(box) != 4:
        raise _Drop("wrong_arity")
    if COORD_SYMBOL.search(desc):
        raise _Drop("dropped_ambiguous")
    return _finish(symbols, desc, match.span(1), [ord(char) - FIRST_COORD for char in box], chars, (start, end))


def _finish(
    symbols: SymbolText,
    desc: str,
    desc_chars: tuple[int, int],
    bins: list[int],
    coord_chars: list[int],
    object_chars: tuple[int, int],
) -> ParsedObject:
    """Run the tests that all codecs share, and convert character positions to token indices."""
    if RESERVED_SYMBOL.search(desc):
        raise _Drop("key_invalid")
    if _SURROGATE.search(desc):
        raise _Drop("malformed")
    x1, y1, x2, y2 = bins
    if not (0 <= x1 < x2 <= MAX_NUMBER and 0 <= y1 < y2 <= MAX_NUMBER):
        raise _Drop("bbox_invalid")
    t1, t2, t3, t4 = (symbols.token_of[char] for char in coord_chars)
    desc_span, object_span = symbols.token_span(*desc_chars), symbols.token_span(*object_chars)
    return ParsedObject(desc, (x1, y1, x2, y2), (t1, t2, t3, t4), desc_span, object_span)


_WALKS: dict[str, Callable[[SymbolText], ParsedAnswer]] = {
    "json": partial(_walk_json, read_coords=_read_coord_tokens, plain_object=_PLAIN_OBJECT),
    "digits": partial(_walk_json, read_coords=_read_integers),
    "tags": _walk_tags,
}
