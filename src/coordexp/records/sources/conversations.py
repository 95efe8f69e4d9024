"""Conversations about images, in the tuning formats of Qwen-VL and ms-swift: JSON lines, or a JSON list.

Boxes are in the assistant's text, as JSON (`bbox_2d` with a `label`) or between Qwen's markers, or in the field
`objects` of ms-swift. Boxes in text are in thousandths of the sides, as Qwen3-VL answers; those in `objects` are in
pixels, unless `bbox_type` or the key `boxes` of the set specifies otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from coordexp.errors import DataError
from coordexp.records.sources.base import ImageNames, Problem, Reading, SourceImage, SourceObject, SplitFiles, corners
from coordexp.records.sources.files import opened, parse_json, read_lines, shown

LAYOUT = (
    "conversations of Qwen-VL or ms-swift: messages or conversations with an image, one JSON object per line or a list"
)
MAX_FAILED = 100  # maximum number of brackets in an answer that do not start valid JSON
UNITS: dict[Any, float | None] = {
    "real": None, "pixel": None, "norm1": 1.0, "norm_1": 1.0, "norm1000": 1000.0, "norm_1000": 1000.0,
}  # fmt: skip
_BOX_KEYS = ("bbox_2d", "bbox", "box", "box_2d")
_NAME_KEYS = ("label", "desc", "name", "category", "ref", "object", "caption", "text_content")
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)"
# <ref>cat</ref><box>(1,2),(3,4)</box> of Qwen-VL; the same with the longer markers of Qwen2-VL.
_REF = re.compile(r"(?:<ref>|<\|object_ref_start\|>)([^<]*)(?:</ref>|<\|object_ref_end\|>)")
_MARKED = re.compile(rf"(?:<box>|<\|box_start\|>){_PAIRS}(?:</box>|<\|box_end\|>)")
_PLACE = re.compile(r"<ref-object>|<bbox>")
# [], {}, {"objects": []}, also in a fence; "None.", "There are no cats."
_NOTHING = re.compile(
    r"(```(json)?)?\s*(\[\s*\]|\{\s*\}|\{\s*\"\w+\"\s*:\s*\[\s*\]\s*\})?\s*(```)?"
    r"|(there (is|are) )?(none|nothing|not any|no)\b[^{\[<]{0,80}"
)
_BOX_BEGINS = (*(re.compile(rf'"{key}"\s*:') for key in _BOX_KEYS), re.compile(r"<box>|<\|box_start\|>"))
_JSON_BEGIN = re.compile(r"[\[{]")
_DECODER = json.JSONDecoder()


def read(files: SplitFiles) -> Reading:
    """Read conversations; image paths are relative to the image folder."""
    problems: list[Problem] = []
    rows = _rows(files, problems)
    first = next(rows, None)
    if first is None or not any(key in first[1] for key in ("messages", "conversations", "objects", "query")):
        found = f"has the keys {shown(list(first[1]), 80)}" if first else "is missing"
        raise DataError(f"{files.path}: its first entry {found}; expected {LAYOUT}.")

    names = ImageNames(files)

    def parse(entry: tuple[str, dict[str, Any]]) -> SourceImage | Problem:
        key, row = entry
        pictures = _pictures(row)
        if len(pictures) != 1:
            return Problem("record_invalid", str(files.path), key, f"{len(pictures)} images, expected 1")
        objects = tuple(_objects(row))
        if not objects and not _says_nothing(row):
            said = shown(" ".join(_texts(row, of_assistant=True)), 60)
            return Problem(
                "record_invalid", str(files.path), key, f"the answer has no box, nor says that none is: {said}"
            )
        return SourceImage(
            file_name=names.find(pictures[0]),
            key=key,
            image_id=None,
            width=row.get("width"),
            height=row.get("height"),
            objects=objects,
            file=str(files.path),
        )

    return Reading(chain([first], rows), (), problems, parse)


def _rows(files: SplitFiles, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, entry) of each JSON object; other entries become problems."""
    with opened(files.path, LAYOUT) as handle:
        is_list = handle.peek(64)[:64].lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"[")
        if is_list:
            entries = parse_json(handle.read(), str(files.path), LAYOUT)
            numbered = ((f"entry {i}", entry) for i, entry in enumerate(entries))
            yield from _objects_only(numbered, files, problems)
            return
        for number, line in read_lines(handle, files.path, LAYOUT):
            if not line.strip():
                continue
            try:
                entry = parse_json(line, f"line {number}", LAYOUT)
            except DataError as error:
                if number == 1:
                    raise DataError(f"{files.path}: {error}") from error
                problems.append(Problem("record_invalid", str(files.path), f"line {number}", str(error)))
                continue
            yield from _objects_only([(f"line {number}", entry)], files, problems)


def _objects_only(entries: Any, files: SplitFiles, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, entry in entries:
        if isinstance(entry, dict):
            yield key, entry
        else:
            detail = f"{shown(entry)}, expected an object"
            problems.append(Problem("record_invalid", str(files.path), key, detail))


def _pictures(row: dict[str, Any]) -> list[Any]:
    """The images of an entry, from any of the usual keys."""
    for key in ("images", "image"):
        value = row.get(key)
        if value:
            return [_path(v) for v in value] if isinstance(value, list) else [_path(value)]
    parts = (part for _, content in _said(row) if isinstance(content, list) for part in content)
    return [
        _path(part.get("image", part.get("image_url", part.get("path"))))
        for part in parts
        if isinstance(part, dict) and part.get("type") in ("image", "image_url")
    ]


def _path(value: Any) -> Any:
    if isinstance(value, dict):
        value = value.get("path", value.get("url"))
    return value.removeprefix("file://") if isinstance(value, str) else value


def _said(row: dict[str, Any]) -> Iterator[tuple[bool, Any]]:
    """(whether it is the assistant's turn, content) of each turn."""
    for key, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = row.get(key)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                role = turn.get(role_key, turn.get("from" if role_key == "role" else "role"))
                yield role in ("assistant", "gpt", "model", "bot"), turn.get(content_key, turn.get("content"))
    if isinstance(row.get("response"), str):
        yield True, row["response"]


def _texts(row: dict[str, Any], of_assistant: bool) -> list[str]:
    found = []
    for is_assistant, content in _said(row):
        if of_assistant and not is_assistant:
            continue
        parts = content if isinstance(content, list) else [content]
        found += [p if isinstance(p, str) else p.get("text") for p in parts if isinstance(p, str | dict)]
    return [text for text in found if isinstance(text, str)]


def _objects(row: dict[str, Any]) -> Iterator[SourceObject]:
    listed = row.get("objects")
    if isinstance(listed, str):  # older versions of ms-swift wrote it as text
        try:
            listed = parse_json(listed.encode(errors="surrogatepass"), "objects", LAYOUT)
        except DataError:
            yield SourceObject(None, None, "objects", found=shown(row["objects"]))
            return
    if listed:
        yield from _of_swift(listed, "".join(_texts(row, of_assistant=False)))
        return
    found = (pair for text in _texts(row, of_assistant=True) for pair in _all_in_text(text))
    for i, (name, values) in enumerate(found):
        box = corners(values)
        yield SourceObject(name, box, f"box {i}", side_units=1000.0, found="" if box else shown(values))


def _says_nothing(row: dict[str, Any]) -> bool:
    """Whether an entry without boxes states that no object is there; a caption or other text does not."""
    listed = row.get("objects")
    if isinstance(listed, dict):
        return not any(listed.values())
    if listed is not None:
        return listed in ([], "", "[]", "{}")
    texts = _texts(row, of_assistant=True)
    return bool(texts) and all(_NOTHING.fullmatch(text.strip().lower()) for text in texts)


def _of_swift(listed: Any, text: str) -> Iterator[SourceObject]:
    """`objects` of ms-swift: {ref, bbox, bbox_type} in the order of <ref-object> and <bbox> in the text; or a list."""
    if isinstance(listed, list):
        for i, entry in enumerate(listed):
            fields = entry if isinstance(entry, dict) else {}
            name = next((fields[key] for key in _NAME_KEYS if key in fields), None)
            yield _with_units(name, fields.get("bbox"), fields.get("bbox_type", "real"), f"objects[{i}]")
        return
    fields = listed if isinstance(listed, dict) else {}
    boxes, refs = (value if isinstance(value, list) else [] for value in (fields.get("bbox"), fields.get("ref")))
    refs = _paired(refs, len(boxes), _PLACE.findall(text))
    for i, box in enumerate(boxes):
        yield _with_units(refs[i], box, fields.get("bbox_type", "real"), f"objects.bbox[{i}]")


def _paired(refs: list[Any], count: int, places: list[str]) -> list[Any]:
    """The name of each box: the one before it in the text; otherwise one name per box, or one for all."""
    if places.count("<bbox>") == count and places.count("<ref-object>") == len(refs) and refs:
        found: list[Any] = []
        number = -1
        for place in places:
            if place == "<ref-object>":
                number += 1
            else:
                found.append(refs[number] if number >= 0 else None)
        if None not in found:
            return found
    if len(refs) == count:
        return refs
    return refs * count if len(refs) == 1 else [None] * count


def _with_units(name: Any, values: Any, kind: Any, key: str) -> SourceObject:
    box = corners(values)
    if not isinstance(kind, str) or kind not in UNITS:
        return SourceObject(name, None, key, found=f"bbox_type {shown(kind)}, expected one of {', '.join(UNITS)}")
    return SourceObject(name, box, key, side_units=UNITS[kind], found="" if box else shown(values))


def _all_in_text(text: str) -> Iterator[tuple[Any, Any]]:
    """As `_in_text`, plus one box without numbers if the answer starts more boxes than it completes."""
    found = list(_in_text(text))
    yield from found
    if len(found) < max(len(begin.findall(text)) for begin in _BOX_BEGINS):
        yield None, "cut, or not JSON"


def _in_text(text: str) -> Iterator[tuple[Any, Any]]:
    """(name, four numbers) of every box in an answer."""
    marked = sorted([*_REF.finditer(text), *_MARKED.finditer(text)], key=lambda found: found.start())
    if marked:
        name = None
        for found in marked:
            if found.re is _REF:
                name = found[1].strip()
            else:
                yield name, list(found.groups())
        return
    at = failed = 0
    while failed < MAX_FAILED and (begin := _JSON_BEGIN.search(text, at)):
        try:
            value, at = _DECODER.raw_decode(text, begin.start())
        except (ValueError, RecursionError):
            at, failed = begin.end(), failed + 1
            continue
        yield from _in_json(value)


def _in_json(value: Any) -> Iterator[tuple[Any, Any]]:
    pending = [value]
    while pending:
        entry = pending.pop()
        if isinstance(entry, list):
            pending += reversed(entry)
        elif isinstance(entry, dict):
            box = next((entry[key] for key in _BOX_KEYS if key in entry), None)
            if box is None:
                pending += [v for v in reversed(entry.values()) if isinstance(v, list | dict)]
            else:
                yield next((entry[key] for key in _NAME_KEYS if key in entry), None), box
