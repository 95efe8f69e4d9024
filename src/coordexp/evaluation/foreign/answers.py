"""Parser for raw answers of other vision-language models, with the same statistics as for our own answers.

| family | format of the answer | numbers |
|---|---|---|
| `qwen3-vl` | JSON, `{"bbox_2d": [x1, y1, x2, y2], "label": ...}` | 0..1000 of each side |
| `qwen2.5-vl` | the same | pixels of the image |
| `gemini` | JSON, `{"box_2d": [y1, x1, y2, x2], "label": ...}` | 0..1000 |
| `rex-omni` | `<|object_ref_start|>dog<|object_ref_end|><|box_start|><12><4><52><61>,...<|box_end|>` | 0..999 bins |
| `paligemma` | `<loc0123><loc0045><loc0800><loc0900> dog ; ...` (y1 x1 y2 x2) | 0..1023 bins |
| `florence-2` | `dog<loc_12><loc_45><loc_800><loc_900>...` (x1 y1 x2 y2) | 0..999 bins |

A truncated list keeps its complete objects and counts as truncated; an unusable object is dropped and counted by
reason, as in text.parser.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from coordexp.config.formats import Family
from coordexp.geometry.boxes import Box
from coordexp.records.gt_vs_pred import ParseReport

FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True, slots=True)
class AnsweredObject:
    """One object of an answer; the box is xyxy in float pixels."""

    label: str
    bbox_xyxy_px: Box


@dataclass(frozen=True, slots=True)
class ForeignAnswer:
    """The objects of one answer, in order, and its parse report."""

    objects: tuple[AnsweredObject, ...]
    report: ParseReport


@dataclass(frozen=True, slots=True)
class _Raw:
    """One object as written, with four numbers xyxy before conversion to pixels; unreadable parts are None."""

    label: Any
    xyxy: tuple[float, ...] | None


def read_answer(text: str, family: Family, width: int, height: int) -> ForeignAnswer:
    """Parse the answer of a model to an image of this size."""
    if family in ("qwen3-vl", "qwen2.5-vl", "gemini"):
        raw, found, cut = _read_json(text, "box_2d" if family == "gemini" else "bbox_2d", family == "gemini")
    else:
        raw, found, cut = _read_marked(text, family)
    parts = {"qwen3-vl": 1000.0, "gemini": 1000.0, "rex-omni": 1000.0, "florence-2": 1000.0, "paligemma": 1024.0}
    scale = (1.0, 1.0) if family == "qwen2.5-vl" else (width / parts[family], height / parts[family])
    # Florence-2's bins stand for their centers, those of the others for their lower edges.
    shift = 0.5 if family == "florence-2" else 0.0
    objects: list[AnsweredObject] = []
    dropped: Counter[str] = Counter()
    for one in raw:
        made = _made(one, scale, shift)
        if isinstance(made, str):
            dropped[made] += 1
        else:
            objects.append(made)
    return ForeignAnswer(tuple(objects), ParseReport(found, len(objects), dict(dropped), cut))


def _made(raw: _Raw, scale: tuple[float, float], shift: float) -> AnsweredObject | str:
    """The object in pixels, or the reason for dropping it."""
    if not isinstance(raw.label, str) or not raw.label.strip():
        return "missing_desc"
    if raw.xyxy is None or len(raw.xyxy) != 4 or not all(map(math.isfinite, raw.xyxy)):
        return "wrong_arity"
    x1, y1, x2, y2 = ((v + shift) * scale[i % 2] for i, v in enumerate(raw.xyxy))
    if x2 < x1 or y2 < y1:
        return "bbox_invalid"
    return AnsweredObject(raw.label.strip(), (x1, y1, x2, y2))


def _read_json(text: str, key: str, y_first: bool) -> tuple[list[_Raw], bool, bool]:
    """Objects of the first JSON list (or single object) in the text, whether there is one, whether it is truncated."""
    start = min((i for i in (text.find("["), text.find("{")) if i >= 0), default=-1)
    if start < 0:
        return [], False, False
    rows: list[Any] = []
    decoder, at, cut = json.JSONDecoder(), start, True
    if text[at] == "[":
        at += 1
    else:
        cut = False
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        if at >= len(text) or text[at] == "]":
            cut = cut and at >= len(text)
            break
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            break
        rows.append(row)
        if not cut:
            break
    return [_json_object(row, key, y_first) for row in rows], True, cut


def _json_object(row: Any, key: str, y_first: bool) -> _Raw:
    if not isinstance(row, dict):
        return _Raw(None, None)
    label = next((row[name] for name in ("label", "desc", "name") if name in row), None)
    values = row.get(key)
    if not isinstance(values, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return _Raw(label, None)
    numbers = tuple(float(v) for v in values)
    return _Raw(label, (numbers[1], numbers[0], numbers[3], numbers[2]) if y_first and len(numbers) == 4 else numbers)


_REX = re.compile(
    r"<\|object_ref_start\|>(?P<label>.*?)<\|object_ref_end\|><\|box_start\|>(?P<boxes>.*?)<\|box_end\|>", re.S
)
_PALIGEMMA = re.compile(r"(?P<boxes>(?:<loc\d{4}>)+)\s*(?P<label>[^;<]*)")
_FLORENCE = re.compile(r"(?P<label>[^<>]*)(?P<boxes>(?:<loc_\d+>)+)")
_NUMBER = re.compile(r"\d+")
_ENDS = re.compile(r"</?s>|<pad>|<bos>|<eos>|<\|im_end\|>|<\|endoftext\|>")  # around an answer, of these families


def _read_marked(text: str, family: Family) -> tuple[list[_Raw], bool, bool]:
    """Objects between a family's marker tokens; an empty answer is valid and has no objects."""
    is_empty = not _ENDS.sub("", text).strip()
    if family == "rex-omni":
        found = [(m["label"], group) for m in _REX.finditer(text) for group in m["boxes"].split(",")]
        open_at, closed = text.rfind("<|object_ref_start|>"), text.rfind("<|box_end|>")
        return [_marked(label, group) for label, group in found], open_at >= 0 or is_empty, open_at > closed
    if family == "paligemma":
        pieces = [(m["label"], m["boxes"]) for m in _PALIGEMMA.finditer(text)]
        return [_marked(label, boxes, y_first=True) for label, boxes in pieces], bool(pieces) or is_empty, False
    groups = [(m["label"], m["boxes"]) for m in _FLORENCE.finditer(text)]
    raw = [_Raw(label, numbers) for label, boxes in groups for numbers in _fours(boxes)]
    return raw, bool(groups) or is_empty, False


def _marked(label: str, boxes: str, y_first: bool = False) -> _Raw:
    numbers = tuple(float(v) for v in _NUMBER.findall(boxes))
    if y_first and len(numbers) == 4:
        numbers = (numbers[1], numbers[0], numbers[3], numbers[2])
    return _Raw(label, numbers)


def _fours(boxes: str) -> Iterator[tuple[float, ...]]:
    """Split the numbers into boxes: Florence-2 lists all boxes of a label without separator."""
    numbers = [float(v) for v in _NUMBER.findall(boxes)]
    for first in range(0, len(numbers), 4):
        yield tuple(numbers[first : first + 4])
