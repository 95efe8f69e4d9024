"""Foreign text made visible: names, paths and messages that nobody here wrote, on their way to people.

A label comes from a stranger's model or file. Control characters in it could command a terminal, marks of direction
could turn a line round, invisible characters could make two names look alike. Each is shown as the escape sequence that
JSON has for it, so JSON that passes here still says the same. Where text goes on as data, it stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

EXCERPT_CHARACTERS = 300
# Letters and marks by Unicode's categories, which show nothing: fillers, joiners, selectors of ideographic variants.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\uffa0\U000e0100-\U000e01ef]")
_LAYOUT = frozenset("\n\t")


def printable(text: str) -> str:
    """Text on one line of which every character shows."""
    if text.isprintable() and not _BLANK.search(text):  # nearly always, and much faster
        return text
    return "".join(c if c.isprintable() and not _BLANK.match(c) else json.dumps(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """The same for text of ours with foreign words in it: ends of lines and tabs stay."""
    if text.isprintable() and not _BLANK.search(text):
        return text
    return "".join(part if part in _LAYOUT else printable(part) for part in re.split(r"([\n\t])", text))


def note(message: str) -> None:
    """Say something beside the answer of a command, on standard error."""
    print(printable_lines(message), file=sys.stderr, flush=True)


def printable_tree(value: Any) -> Any:
    """JSON with all of its texts printable, keys included."""
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
    """A text stream that writes as `printable_lines`, in all else the one behind it, which is `raw`."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        """Returns the number of characters of `text`; a bar of progress may begin its line again."""
        again = "\r" if text.startswith("\r") else ""
        self.raw.write(again + printable_lines(text[len(again) :]))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each of them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """What the block prints is printable; a library that commands the terminal is given `raw_stderr`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, PrintableStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def raw_stderr() -> TextIO:
    """The standard error stream itself."""
    return sys.stderr.raw if isinstance(sys.stderr, PrintableStream) else sys.stderr
