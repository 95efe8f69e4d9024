"""Escape foreign text before it is shown: labels, paths and messages from models and files.

Control characters in a foreign label could command a terminal, direction marks could reverse a line, and invisible
characters could make two names look alike. Each is shown as its JSON escape sequence, so that JSON keeps its meaning.
Text that is stored as data is not changed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

EXCERPT_CHARACTERS = 300
# Unicode letters and marks that render as nothing: fillers, joiners, variation selectors.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\uffa0\U000e0100-\U000e01ef]")
_LAYOUT = frozenset("\n\t")


def printable(text: str) -> str:
    """Text on one line in which every character is visible."""
    if text.isprintable() and not _BLANK.search(text):  # the common case, and much faster
        return text
    return "".join(c if c.isprintable() and not _BLANK.match(c) else json.dumps(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """As `printable`, for our own text with foreign words in it: line breaks and tabs stay."""
    if text.isprintable() and not _BLANK.search(text):
        return text
    return "".join(part if part in _LAYOUT else printable(part) for part in re.split(r"([\n\t])", text))


def note(message: str) -> None:
    """Print a message on standard error."""
    print(printable_lines(message), file=sys.stderr, flush=True)


def printable_tree(value: Any) -> Any:
    """A JSON value with all strings printable, including keys."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_tree(key): printable_tree(inner) for key, inner in value.items()}
    return [printable_tree(inner) for inner in value] if isinstance(value, list | tuple) else value


def excerpt(text: str | bytes) -> str:
    """The beginning of a foreign text, as `printable`."""
    if isinstance(text, bytes):
        text = text[: 4 * EXCERPT_CHARACTERS].decode(errors="replace")
    return printable(text[:EXCERPT_CHARACTERS]) + ("..." if len(text) > EXCERPT_CHARACTERS else "")


class PrintableStream:
    """A text stream that escapes its output with `printable_lines`, and otherwise behaves as the stream `raw`."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        """Write and return the number of characters of `text`; a progress bar may start with a carriage return."""
        again = "\r" if text.startswith("\r") else ""
        self.raw.write(again + printable_lines(text[len(again) :]))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Escape all output of the block; a library that controls the terminal gets `raw_stderr`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, PrintableStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def raw_stderr() -> TextIO:
    """The standard error stream without escaping."""
    return sys.stderr.raw if isinstance(sys.stderr, PrintableStream) else sys.stderr
