"""What the strict parser made of the answers, and which answers no score should be read from.

Answers that are cut at the token budget, repeat themselves in a loop or cannot be parsed say how a checkpoint fails,
not how well it detects: two of them can differ by an interval that excludes 0 and mean nothing. So a report says this
first, and calls no such checkpoint better or worse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coordexp.evaluation.set_behaviour import find_duplicates, first_of_duplicates
from coordexp.evaluation.table import DetectionTable
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.text.parser import DROP_REASONS


def drop_key(reason: str) -> str:
    """The metric that counts the objects dropped for a reason."""
    return f"dropped_{reason.removeprefix('dropped_')}"


def parse_metrics(results: Sequence[ImageResult]) -> dict[str, float | int | None]:
    """The `parse` area of the metrics, with `dropped_<reason>` for each reason the parser knows, or the file names.

    Of detectors that do not answer in text only `empty_rate` is defined.
    """
    dropped: Counter[str] = Counter(dict.fromkeys(DROP_REASONS, 0))
    reports = [r.parse for r in results if r.parse is not None]
    for report in reports:
        dropped.update(report.dropped)
    keys = ("parse_rate", "valid_objects", "dropped_total", *(drop_key(reason) for reason in sorted(dropped)))
    counted: list[float | int] = [
        sum(report.ok for report in reports) / len(results),
        sum(report.n_valid for report in reports),
        dropped.total(),
        *(dropped[reason] for reason in sorted(dropped)),
    ]
    shown = dict(zip(keys, counted, strict=True)) if len(reports) == len(results) else dict.fromkeys(keys)
    return {**shown, "empty_rate": sum(not r.pred for r in results) / len(results)}


MOST_FAULTY = 0.05  # share of the answers above which a fault outranks every verdict
LOOP_IOU = 0.9  # objects of one name are the same one again from here on
LOOP_COPIES = 4  # an answer loops from so many copies of earlier objects on
LOOP_SHARE = 1 / 3  # if they are at least this share of its objects: a crowded image may hold a few duplicates
FAULTS = {
    "parse.truncated_rate": "are cut at the token budget (`max_new_tokens`)",
    "parse.loop_rate": "loop, naming the same objects again and again",
    "parse.unreadable_rate": "do not parse",
}


def is_cut(result: ImageResult) -> bool:
    """Whether the token budget ended the answer, even one in which no object list was found."""
    return result.finish_reason == "length" or (result.parse is not None and result.parse.truncated)


def is_unreadable(result: ImageResult) -> bool:
    """Whether the parser found no object list, lost its way in it, or could use nothing of what it holds."""
    parse = result.parse
    if parse is None:  # no text to read
        return False
    useless = bool(parse.dropped) and not parse.n_valid
    return not parse.container_found or "malformed" in parse.dropped or useless


def soundness_metrics(results: Sequence[ImageResult], table: DetectionTable) -> dict[str, float]:
    """The rates of `FAULTS`, of the answers that `table` lays out, for the `parse` area of the metrics."""
    n_pred = len(table.pred_score_P)
    copies_P = ~first_of_duplicates(n_pred, find_duplicates(table, LOOP_IOU), LOOP_IOU)
    copies_I = np.bincount(table.pred_image_P[copies_P], minlength=table.n_images)
    loops_I = (copies_I >= LOOP_COPIES) & (copies_I >= LOOP_SHARE * table.n_pred_I)
    return {
        "truncated_rate": sum(map(is_cut, results)) / len(results),
        "loop_rate": float(loops_I.mean()),
        "unreadable_rate": sum(map(is_unreadable, results)) / len(results),
    }


def faults_of(areas: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the answers behind some metrics, in words; empty if no rate is above MOST_FAULTY."""
    rates = {key: areas["parse"][key.removeprefix("parse.")] for key in FAULTS}
    return [f"{100 * rate:.3g} % of the answers {FAULTS[key]}" for key, rate in rates.items() if rate > MOST_FAULTY]
