"""Streaming JSON reader: yields the elements of an object's lists one at a time, for files of any size."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.records.sources.files import opened

CHUNK_BYTES = 1 << 22
MAX_ELEMENT_CHARS = 1 << 26  # maximum length of an element: a missing bracket must not load the whole file
_SPACES = " \t\n\r"
_BEHIND_VALUES = _SPACES + ",:]}"
LIST = object()  # marks the start of a list

OnObject = Callable[[dict[str, Any]], dict[str, Any]]


def stream_json(
    path: Path, expected: str, on_object: OnObject | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of each member of the object; for a list, (key, LIST) and then (key, element) of each element.

    Args:
        path: the file, in UTF-8, UTF-16 or UTF-32.
        expected: its expected content, for messages.
        on_object: may change each object while it is parsed.
        chunk_bytes: number of bytes to read at once.

    Raises:
        DataError: the file is not JSON, is not an object, or is nested too deeply; the message has file and line.
    """
    with opened(path, expected) as handle:
        yield from _Text(handle, path, expected, on_object, chunk_bytes).members()


class _Text:
    """The part of the file in memory, and the position in it."""

    def __init__(
        self, handle: BufferedReader, path: Path, expected: str, on_object: OnObject | None, chunk_bytes: int
    ) -> None:
        self.handle, self.path, self.expected, self.chunk_bytes = handle, path, expected, chunk_bytes
        self.scan = json.JSONDecoder(object_hook=on_object).raw_decode
        self.decoder = codecs.getincrementaldecoder(json.detect_encoding(handle.peek(4)[:4]))()
        self.text, self.at, self.lines, self.at_end = "", 0, 1, False

    def members(self) -> Iterator[tuple[str, Any]]:
        """As `stream_json`."""
        if self.next() != "{":
            self.fail("not an object")
        self.at += 1
        if self.next() == "}":
            self.at += 1
        else:
            yield from self.pairs()
        if self.next():
            self.fail("extra data after the object")

    def pairs(self) -> Iterator[tuple[str, Any]]:
        while True:
            if self.next() != '"':
                self.fail("expected a name in quotes")
            key = self.value()
            self.skip(":")
            if self.next() == "[":
                yield key, LIST
                for element in self.elements():
                    yield key, element
            else:
                yield key, self.value()
            if self.skip(",", "}") == "}":
                return

    def elements(self) -> Iterator[Any]:
        self.skip("[")
        if self.next() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.skip(",", "]") == "]":
                return

    def next(self) -> str:
        """The next non-space character; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACES:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def skip(self, *wanted: str) -> str:
        found = self.next()
        if found not in wanted or not found:
            self.fail(f"expected {' or '.join(map(repr, wanted))}")
        self.at += 1
        return found

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > MAX_ELEMENT_CHARS or not self.more():
                    self.at = max(self.at, min(error.pos, len(self.text)))
                    self.fail(error.msg)
                continue
            except RecursionError as error:
                raise DataError(
                    f"{self.path}: nested too deeply to be annotations; expected {self.expected}."
                ) from error
            except ValueError as error:  # an integer with too many digits for Python
                raise DataError(f"{self.path}: not JSON in UTF-8 ({error}); expected {self.expected}.") from error
            # A number at the end of the chunk may have more digits in the next one.
            is_cut = end == len(self.text) or self.text[end] not in _BEHIND_VALUES
            if is_cut and len(self.text) - self.at <= MAX_ELEMENT_CHARS and self.more():
                continue
            self.at = end
            return value

    def more(self) -> bool:
        """Read more, and discard the text before the position; returns whether there was more."""
        if self.at_end:
            return False
        # Doubling the text keeps the repeated scans of a long element linear in total.
        size = max(self.chunk_bytes, len(self.text) - self.at)
        content = self.handle.read(size)
        self.at_end = not content
        try:
            read = self.decoder.decode(content, final=self.at_end)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not JSON in UTF-8 ({error}); expected {self.expected}.") from error
        self.lines += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :] + read
        self.at = 0
        return bool(read) or not self.at_end

    def fail(self, reason: str) -> None:
        line = self.lines + self.text.count("\n", 0, self.at)
        raise DataError(f"{self.path}:{line}: not valid JSON ({reason}); expected {self.expected}.")
