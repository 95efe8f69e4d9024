"""Input validation for foreign files: regular files of bounded size, UTF-8 text, and unambiguous JSON.

A `Gate` describes one kind of file: what is expected, its maximum size and nesting depth, and the error to raise for
anything else. Each kind is declared once, next to the code that interprets it (parameters in config/loading.py,
checkpoints in models/folder.py, predictions in records/gt_vs_pred.py and records/prediction_log.py). Images are
validated in records/images.py, which opens files through this module, too. A file in a folder with a list of hashes
(infra/artefacts.py) must also be the file that was written there.

Python's JSON parser by itself accepts NaN, keeps the last of two equal keys, turns 1e999 into infinity, raises
RecursionError on deep nesting, and returns strings that cannot be encoded again. All of this is refused here.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from coordexp.errors import CoordExpError, DamagedArtefactError
from coordexp.infra.artefacts import RESTORE, unsealed_row, verified

MAX_DIGITS = 40  # of an integer: far above ids and sizes, far below where parsing gets slow (quadratic in digits)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a block"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class FileTooLargeError(OSError):
    """A file is larger than the maximum size of its kind."""


@contextmanager
def open_regular(path: str | os.PathLike[str], max_bytes: int | None) -> Iterator[BufferedReader]:
    """Open a regular file; reading anything else may block forever, and opening a device may have side effects.

    Raises:
        OSError: the file does not exist, is not readable, is not regular, or is too large (`FileTooLargeError`).
    """
    check_regular(os.stat(path), max_bytes)
    # The file may have been replaced since the check, so it is checked again once open. O_NONBLOCK: opening a pipe
    # would otherwise block until a writer appears.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as handle:
        check_regular(os.fstat(handle.fileno()), max_bytes)
        yield handle


def check_regular(found: os.stat_result, max_bytes: int | None) -> None:
    """Raise OSError, as `open_regular` does, for a file that must not be opened; None allows any size."""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(f"it is {kind}, expected a regular file")
    if max_bytes is not None and found.st_size > max_bytes:
        raise FileTooLargeError(f"{found.st_size} bytes are more than the maximum of {max_bytes}")


@dataclass(frozen=True, slots=True)
class Gate:
    """One kind of foreign file.

    Attributes:
        what: what is expected, for messages: "a parameter file".
        error: the exception class to raise for anything else.
        remedy: a sentence that tells the user what to do.
        max_bytes: maximum size of a file; for `json_lines`, of a line.
        max_depth: maximum nesting depth of lists and objects.
    """

    what: str
    error: type[CoordExpError]
    remedy: str
    max_bytes: int = 1 << 26
    max_depth: int = 32

    def read_bytes(self, path: Path) -> bytes:
        """The bytes of a file; raises `error`."""
        with self._opened(path, self.max_bytes) as handle:
            return handle.read()

    def read_text(self, path: Path) -> str:
        """The text of a file in UTF-8, without a byte-order mark; raises `error`."""
        return self._decoded(self.read_bytes(path), str(path))

    def read_json(self, path: Path) -> Any:
        """The value of a JSON file; raises `error`."""
        return self.parse_json(self.read_bytes(path), str(path))

    def read_object(self, path: Path) -> dict[str, Any]:
        """The value of a JSON file, which must be an object; raises `error`."""
        value = self.read_json(path)
        if not isinstance(value, dict):
            self.refuse(str(path), f"holds {shown(value)}, not a JSON object")
        return value

    def read_sealed(self, path: Path) -> dict[str, Any]:
        """The JSON object of a file that `write_sealed` wrote; raises `error`, or DamagedArtefactError."""
        value = self.read_object(path)
        try:
            return unsealed_row(value)
        except ValueError as error:
            raise DamagedArtefactError(f"{path}: {error}: damaged, or edited. {RESTORE}.") from error

    def json_lines(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Place ("file:line") and value of each line of a file of any size; raises `error`, also on an empty line."""
        for where, line in self.lines(path):
            yield where, self.parse_json(line, where)

    def lines(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Place ("file:line") and bytes of each line, including its line break."""
        number = 0
        with self._opened(path, None) as handle:
            while line := handle.readline(self.max_bytes + 1):
                number += 1
                if len(line) > self.max_bytes:
                    self.refuse(f"{path}:{number}", f"the line is longer than {self.max_bytes} bytes")
                yield f"{path}:{number}", line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line

    def parse_json(self, text: bytes | str, where: str) -> Any:
        """The value of the JSON text found at `where`; raises `error`."""
        decoded = self._decoded(text, where) if isinstance(text, bytes) else text
        try:
            return strict_json(decoded, self.max_depth)
        except ValueError as error:
            self.refuse(where, f"not valid JSON: {error}", error)

    def refuse(self, where: str, reason: str, cause: BaseException | None = None) -> NoReturn:
        """Raise `error`: the content at `where` is not what was expected."""
        raise self.error(f"{where}: {reason}. Expected {self.what}. {self.remedy}".rstrip()) from cause

    def _decoded(self, text: bytes, where: str) -> str:
        try:
            return text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.refuse(where, f"not UTF-8 text ({error.reason} at byte {error.start})", error)

    @contextmanager
    def _opened(self, path: Path, max_bytes: int | None) -> Iterator[BufferedReader]:
        try:
            with open_regular(verified(path), max_bytes) as handle:
                yield handle
        except FileNotFoundError as error:
            self.refuse(str(path), "no such file", error)
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            self.refuse(str(path), f"cannot be read ({getattr(error, 'strerror', None) or error})", error)


def strict_json(text: str, max_depth: int = 32) -> Any:
    """The value of JSON text; raises ValueError with the reason."""
    try:
        value = (_CAREFUL if _ODD_NUMBER.search(text) else _PLAIN).decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"nested deeper than {max_depth}") from error
    check_tree(value, max_depth)
    if _SURROGATE_ESCAPE.search(text):
        check_text(value)
    return value


def check_tree(value: Any, max_depth: int) -> None:
    """Raise ValueError for a tree that is nested too deeply; also works for a tree that contains itself."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(max_depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {max_depth}")


def check_text(value: Any) -> None:
    """Raise ValueError if a tree (which must not contain itself) has text that cannot be encoded as UTF-8."""
    if isinstance(value, str) and _SURROGATE.search(value):
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff), which is not a character")
    if isinstance(value, (dict, list)):
        for inner in value:
            check_text(inner)
    if isinstance(value, dict):
        for inner in value.values():
            check_text(inner)


def shown(value: Any) -> str:
    """Quote a value for a message, short enough for one line: "'high' (text)"."""
    if value is None:
        return "nothing"
    text = _SHORT.repr(value)  # never the full repr: with YAML aliases, a few lines expand to gigabytes
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({_NOUNS.get(type(value), type(value).__name__)})"


def first_fault(errors: Sequence[Mapping[str, Any]]) -> str:
    """Describe the first of pydantic's `ValidationError.errors()`: "pred[0].score is 'high' (text): expected ...".

    An error of the key `version` comes first, because it explains all others.
    """
    fault = min(errors, key=lambda fault: fault["loc"] != ("version",))
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).removeprefix(".")
    reason = str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    if fault["type"] == "missing":
        return f"{key} is missing"
    return f"{key} is {shown(fault['input'])}: {reason}" if key else reason


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} occurs twice in one object")
    return found


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:30]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number with {len(text)} digits")
    return int(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


# Most texts contain no number that the hooks would refuse, and calling the hooks for every number triples the time.
_ODD_NUMBER = re.compile(rf"[0-9][eE]|[0-9]{{{MAX_DIGITS}}}")
_PLAIN = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_CAREFUL = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
)
