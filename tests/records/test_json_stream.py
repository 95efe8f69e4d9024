"""Reading a JSON file in pieces gives the result of `json`, for every size of the pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.errors import DataError
from coordexp.records.sources.json_stream import LIST, stream_json

scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=4))
documents = st.dictionaries(st.text(max_size=4), values, max_size=5)


def rebuilt(path: Path, chunk_bytes: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in stream_json(path, "x", chunk_bytes=chunk_bytes):
        if value is LIST:
            result[key] = []
        elif isinstance(result.get(key), list):
            result[key].append(value)
        else:
            result[key] = value
    return result


@given(document=documents, chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii_only=st.booleans(),
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_reading_in_pieces_equals_reading_as_a_whole(document, chunk, indent, ascii_only, encoding, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode(encoding, "replace"))
    assert rebuilt(path, chunk) == json.loads(path.read_text(encoding))


@given(document=documents, data=st.data(), chunk=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_refused_as_json_refuses_it(document, data, chunk, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps(document)
    at = data.draw(st.integers(0, len(text)))
    damaged = text[:at] + data.draw(st.sampled_from(["", "]", "}", "[", "{", ",", '"', "1", "x", " "])) + text[at + 1 :]
    path.write_text(damaged)
    try:
        expected = json.loads(damaged)
    except ValueError:
        expected = None
    if isinstance(expected, dict):
        pairs = json.loads(damaged, object_pairs_hook=list)
        if len({key for key, _ in pairs}) == len(pairs):
            assert rebuilt(path, chunk) == expected
        return
    with pytest.raises(DataError, match=r"a\.json"):
        rebuilt(path, chunk)


def test_errors_name_the_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [\n1,\n2,\n{"b": ]}\n]}')
    with pytest.raises(DataError, match=r"a\.json:4: not valid JSON"):
        rebuilt(path, 3)
