"""Input validation for annotation files: regular files of limited size and depth, in common encodings.

Every fault of a file is a DataError that names the file and what was expected, and quotes only a little of it.
"""

from __future__ import annotations

import csv
import io
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq

from coordexp.config.loading import parse_yaml
from coordexp.errors import ConfigError, DataError
from coordexp.infra.foreign import check_regular, open_regular

MAX_JSON_BYTES = 1 << 31  # for files that are read as a whole; COCO's layout is read in pieces, with any size
MAX_TEXT_BYTES = 1 << 28  # lists of images, labels, XML
MAX_YAML_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 26
MAX_XML_DEPTH = 100
MAX_YAML_DEPTH = 50  # nesting of brackets; the parser's time is quadratic in it
GLOB = re.compile(r"[*?\[]")
# XML parsers expand entities: a few lines could fill the memory ("billion laughs"), and annotation files have none.
_ENTITY = re.compile(r"<!(?:DOCTYPE|ENTITY)", re.IGNORECASE)
_BRACKET = re.compile(r"[\[\]{}]")
_XML_ENCODING = re.compile(rb"<\?xml[^>]*encoding=[\"']([A-Za-z0-9._-]+)[\"']")
_XML_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")


@contextmanager
def opened(path: Path, expected: str, max_bytes: int | None = None) -> Iterator[BufferedReader]:
    """Open an annotation file for reading.

    Args:
        path: the file.
        expected: its expected content, for messages.
        max_bytes: maximum file size; None: any.

    Raises:
        DataError: the file is missing, not regular, too large, unreadable, or has the suffix of a pickle.
    """
    refuse_pickle(path)
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: not a valid file name; expected {expected}.")
    try:
        with open_regular(path, max_bytes) as handle:
            yield handle
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; expected {expected}.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected {expected}.") from error


def is_readable(path: Path) -> bool:
    """Whether a path is a regular file; reading anything else may block forever."""
    try:
        check_regular(path.stat(), None)
    except (OSError, ValueError):
        return False
    return True


def read_json(path: Path, expected: str, on_object: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Any:
    """The value of a JSON file; `on_object` may change each object while it is parsed.

    Raises:
        DataError: the message has file, line and what was expected.
    """
    with opened(path, expected, MAX_JSON_BYTES) as handle:
        return parse_json(handle.read(), str(path), expected, on_object)


def parse_json(
    content: bytes, where: str, expected: str, on_object: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Any:
    """The value of a JSON text in UTF-8, UTF-16 or UTF-32; raises DataError as `read_json`."""
    try:
        return json.loads(content.decode(json.detect_encoding(content)), object_hook=on_object)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}:{error.lineno}: not valid JSON ({error.msg}); expected {expected}.") from error
    except ValueError as error:  # not UTF-8, or an integer with too many digits for Python
        raise DataError(f"{where}: not JSON in UTF-8 ({error}); expected {expected}.") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be annotations; expected {expected}.") from error


def read_text(path: Path, expected: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, without a byte-order mark.

    Raises:
        DataError: the message has file and what was expected.
    """
    with opened(path, expected, max_bytes) as handle:
        content = handle.read()
    try:
        return content.decode(json.detect_encoding(content)).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); expected {expected}. Save it as UTF-8.") from error


def read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """The mapping in a YAML file; raises DataError with the file and what was expected."""
    text = read_text(path, expected, MAX_YAML_BYTES)
    if _depth(text) > MAX_YAML_DEPTH:
        raise DataError(f"{path}: nested too deeply; expected {expected}.")
    try:
        return parse_yaml(text, str(path), any_keys=True)
    except ConfigError as error:
        raise DataError(f"{error} Expected {expected}.") from error
    except (RecursionError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise DataError(f"{path}: not valid YAML ({type(error).__name__}); expected {expected}.") from error


def _depth(text: str) -> int:
    """Maximum nesting depth of brackets."""
    deepest = depth = 0
    for found in _BRACKET.findall(text):
        depth += 1 if found in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def read_xml(path: Path, expected: str) -> ElementTree.Element:
    """The root of an XML file; raises DataError as `stream_xml`."""
    root = None
    for element in stream_xml(path, expected):
        root = element
    if root is None:
        raise DataError(f"{path}: contains no XML; expected {expected}.")
    return root


def stream_xml(path: Path, expected: str, tag: str = "") -> Iterator[ElementTree.Element]:
    """Yield each element named `tag` when it is complete, then clear it; without a tag, yield the root.

    Raises:
        DataError: the file is not XML, is nested too deeply, or declares a document type or an entity.
    """
    with opened(path, expected, MAX_TEXT_BYTES) as handle:
        text = _xml_text(handle.read(), path, expected)
    if _ENTITY.search(text):
        raise DataError(
            f"{path}: it declares a document type or an entity, which is not allowed in {expected}; not read."
        )
    parser: ElementTree.XMLPullParser[Any] = ElementTree.XMLPullParser(events=("start", "end"))
    depth = 0
    wanted: ElementTree.Element | None = None
    try:
        for begin in range(0, len(text), 1 << 16):
            parser.feed(text[begin : begin + (1 << 16)])
            for event, element in parser.read_events():  # type: ignore[misc]
                if not isinstance(element, ElementTree.Element):
                    continue
                depth += 1 if event == "start" else -1
                if depth > MAX_XML_DEPTH:
                    raise DataError(f"{path}: nested too deeply to be annotations; expected {expected}.")
                if event == "end" and tag and element.tag == tag:
                    yield element
                    element.clear()
                elif event == "end" and depth == 0:
                    wanted = element
        parser.close()
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: not valid XML ({error}); expected {expected}.") from error
    if not tag and wanted is not None:
        yield wanted


def _xml_text(content: bytes, path: Path, expected: str) -> str:
    """The text decoded as declared, without the declaration, so that an encoding cannot hide entities."""
    declared = _XML_ENCODING.search(content[:200])
    encoding: str = json.detect_encoding(content)
    if encoding == "utf-8" and declared:
        encoding = declared[1].decode("ascii")
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except (LookupError, ValueError) as error:
        raise DataError(f"{path}: not text in {encoding} ({error}); expected {expected}.") from error
    return _XML_DECLARATION.sub("", text)


def read_csv(path: Path, expected: str) -> Iterator[list[str]]:
    """The non-empty rows of a table; columns are separated by commas, semicolons or tabs.

    Raises:
        DataError: the message has file, line and what was expected.
    """
    with opened(path, expected) as handle:
        encoding = json.detect_encoding(handle.peek(4)[:4])
        text = io.TextIOWrapper(handle, encoding=encoding, newline="")
        first, line = "", 0
        try:
            first = text.readline(1 << 16).removeprefix("\ufeff")
            delimiter = max(",;\t", key=first.count)
            rows = csv.reader(_lines(first, text), delimiter=delimiter, skipinitialspace=True)
            for row in rows:
                line = rows.line_num
                if any(cell.strip() for cell in row):
                    yield [cell.strip() for cell in row]
        except (csv.Error, ValueError) as error:
            raise DataError(f"{path}:{line + 1}: not a table of text ({error}); expected {expected}.") from error
        finally:
            text.detach()


def _lines(first: str, rest: io.TextIOWrapper) -> Iterator[str]:
    yield first
    while line := rest.readline(1 << 20):
        yield line


def read_lines(handle: BufferedReader, path: Path, expected: str) -> Iterator[tuple[int, bytes]]:
    """Number and UTF-8 bytes of each line of a text in UTF-8, UTF-16 or UTF-32; UTF-8 is not validated here.

    Raises:
        DataError: the file starts like UTF-16 or UTF-32, but is not valid.
    """
    encoding, number = json.detect_encoding(handle.peek(4)[:4]), 0
    if encoding.startswith("utf-8"):
        while line := handle.readline(MAX_LINE_BYTES):
            number += 1
            yield number, line
        return
    text = io.TextIOWrapper(handle, encoding)
    try:
        while decoded := text.readline(MAX_LINE_BYTES):
            number += 1
            yield number, decoded.encode()
    except ValueError as error:
        raise DataError(f"{path}:{number + 1}: not text in {encoding} ({error}); expected {expected}.") from error
    finally:
        text.detach()


@contextmanager
def opened_parquet(path: Path, expected: str) -> Iterator[pq.ParquetFile]:
    """Open a parquet file; raises DataError with its name, also for read errors within the block."""
    with opened(path, expected) as handle:
        try:
            yield pq.ParquetFile(handle)
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not a parquet file ({shown(str(error), 200)}); expected {expected}.") from error


def annotation_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The annotation files for a key: one file, the matching files in a folder, or the matches of a glob pattern."""
    if path.is_dir():
        found = (p for p in path.rglob("*") if p.suffix.lower() in suffixes)
    elif not path.exists() and GLOB.search(path.name):
        found = path.parent.glob(path.name)
    else:
        return [path]
    return sorted(p for p in found if is_readable(p))


def refuse_pickle(path: Path) -> None:
    """Raise DataError for a file with the suffix of a pickle: loading a pickle can run arbitrary code."""
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise DataError(
            f"{path}: pickles are not read, because loading one can run code. Use the JSON form or the Hugging Face "
            "parquet form of the same annotations (docs/data.md says which)."
        )


def shown(value: Any, length: int = 40) -> str:
    """Quote a foreign value for messages; it is shortened before formatting, as it may have any size and depth."""
    text = value if isinstance(value, str) and length > 40 else reprlib.repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
