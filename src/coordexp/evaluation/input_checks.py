"""What the evaluator does with bad input, decided here: an error that names the place, or a counter.

An error is for what would make a number wrong; a counter is for what a model may well answer and metrics can judge.
`BAD_INPUT` is the whole list, and docs/metrics.md prints it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from coordexp.errors import DataError
from coordexp.evaluation.categories import MATCHED_BY
from coordexp.evaluation.table import DetectionTable
from coordexp.geometry.boxes import area
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import ImageResult

_OUTSIDE_PX = 1.0  # a box may leave its image by rounding, not by more


@dataclass(frozen=True, slots=True)
class BadInput:
    """One kind of bad input and what becomes of it."""

    what: str
    outcome: str  # the error's words, or the metric that counts it
    why: str


BAD_INPUT = (
    BadInput("file without a line", "error: no predictions in the file", "there is nothing to evaluate"),
    BadInput("truncated last line", "error: the last line is cut", "images would be missing without a trace"),
    BadInput("line that is no JSON, or lacks a key", "error, by file and line", "the file was edited or mixed up"),
    BadInput("image twice", "error: image id appears twice", "it would weigh double"),
    BadInput("image that the annotations do not hold", "error: image id is not in the annotations", "wrong split"),
    BadInput("annotated name that is no category", "error: annotated object is none of the categories", "wrong list"),
    BadInput("box with NaN or infinity", "error, by file and line", "no comparison with it means anything"),
    BadInput("box with x2 < x1 or y2 < y1", "error, by file and line", "the parser drops and counts these before"),
    BadInput("annotated area that cannot be one", "error, by file and line", "it decides what is small and large"),
    BadInput("prediction without a finite score", "error: AP needs a finite score", "a score is never invented"),
    BadInput("box of no area", "`input.zero_area_boxes`; judged, overlaps nothing", "a model may answer it"),
    BadInput("box outside its image by over 1 px", "`input.outside_boxes`; judged as it is", "a model may answer it"),
    BadInput("description with control characters", "`input.control_char_descs`; they become spaces", "as above"),
    BadInput("empty description", "`input.empty_descs`; judged, names no category", "as above"),
    BadInput("description that names no category", "`input.names_unmapped`; judged, wrong by name", "as above"),
    BadInput("description near two categories alike", "`input.names_ambiguous`; judged, wrong by name", "as above"),
    BadInput("score outside [0, 1]", "`input.scores_outside_unit`; ranks, but has no ECE", "no probability"),
)


def check_known_images(results: Sequence[ImageResult], known_ids: Set[int], where: str) -> None:
    """Raise DataError unless the annotations in `where` hold every image of the results."""
    unknown = sorted(r.image_id for r in results if r.image_id not in known_ids)
    if unknown:
        raise DataError(
            f"Image id {unknown[0]} is not in the annotations {where} ({len(unknown)} such images of {len(results)}); "
            "evaluate predictions against their own split."
        )


def input_metrics(results: Sequence[ImageResult], table: DetectionTable) -> dict[str, int]:
    """The `input` area of the metrics: predictions by how their name was found, and those that are odd."""
    descs = [p.desc for result in results for p in result.pred]
    distinct = {desc: (_has_control(desc), not normalise_desc(desc)) for desc in table.found}
    ways = [table.found[desc][1] for desc in descs]
    size_P2 = table.sizes_wh_I2[table.pred_image_P]
    low_P2, high_P2 = table.pred_boxes_P4[:, :2], table.pred_boxes_P4[:, 2:]
    outside_P = (low_P2 < -_OUTSIDE_PX).any(axis=1) | (high_P2 > size_P2 + _OUTSIDE_PX).any(axis=1)
    return {
        **{f"names_{how}": ways.count(how) for how in MATCHED_BY},
        "control_char_descs": sum(distinct[desc][0] for desc in descs),
        "empty_descs": sum(distinct[desc][1] for desc in descs),
        "zero_area_boxes": int((area(table.pred_boxes_P4) <= 0).sum()),
        "outside_boxes": int(outside_P.sum()),
        "scores_outside_unit": int(np.count_nonzero((table.pred_score_P < 0) | (table.pred_score_P > 1))),
    }


def _has_control(desc: str) -> bool:
    return any(unicodedata.category(char) == "Cc" for char in desc)
