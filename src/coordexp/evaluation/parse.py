"""Parser statistics of the answers, and the faults that make the scores of a checkpoint meaningless.

If answers are truncated at the token budget, loop, or cannot be parsed, a score reflects the failure rather than
detection quality: two such checkpoints can differ by an interval that excludes 0 without any meaning. A report states
such faults first, and gives no verdict on the checkpoint.
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
    """The key of the metric that counts objects dropped for a reason."""
    return f"dropped_{reason.removeprefix('dropped_')}"


def parse_metrics(results: Sequence[ImageResult]) -> dict[str, float | int | None]:
    """The `parse` area of the metrics, with `dropped_<reason>` for each reason of the parser or in the file.

    For detectors that do not answer in text, only `empty_rate` is defined.
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


MOST_FAULTY = 0.05  # fraction of the answers above which a fault overrides every verdict
LOOP_IOU = 0.9  # minimum IoU of two objects of one name that count as copies
LOOP_COPIES = 4  # minimum number of copies of earlier objects in an answer that loops
LOOP_SHARE = 1 / 3  # their minimum fraction of its objects, because a crowded image may have a few duplicates
FAULTS = {
    "parse.truncated_rate": "are truncated at the token budget (`max_new_tokens`)",
    "parse.loop_rate": "loop, repeating the same objects",
    "parse.unreadable_rate": "do not parse",
}


def is_cut(result: ImageResult) -> bool:
    """Whether the token budget ended the answer, even if the parser found no object list."""
    return result.finish_reason == "length" or (result.parse is not None and result.parse.truncated)


def is_unreadable(result: ImageResult) -> bool:
    """Whether the parser found no object list, found it malformed, or dropped all of its objects."""
    parse = result.parse
    if parse is None:  # not a text answer
        return False
    useless = bool(parse.dropped) and not parse.n_valid
    return not parse.container_found or "malformed" in parse.dropped or useless


def soundness_metrics(results: Sequence[ImageResult], table: DetectionTable) -> dict[str, float]:
    """The rates of `FAULTS` for the answers in `table`, as part of the `parse` area of the metrics."""
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
    """The faults of the answers behind some metrics, in words; empty if no rate is above MOST_FAULTY."""
    rates = {key: areas["parse"][key.removeprefix("parse.")] for key in FAULTS}
    return [f"{100 * rate:.3g} % of the answers {FAULTS[key]}" for key, rate in rates.items() if rate > MOST_FAULTY]
