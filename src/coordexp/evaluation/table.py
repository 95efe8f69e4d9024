"""The predictions of a whole data set as flat arrays, the input of every metric, and the handling of bad input.

Input that would make a metric wrong is an error, which names its location. Input that a model may plausibly produce and
metrics can handle is counted (the `input` area). `BAD_INPUT` is the complete list, which docs/metrics.md prints.

Legend: I images (sorted by image id), G annotated objects, P predictions, K categories. Objects and predictions are
grouped by image; within an image predictions keep their generation order.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from coordexp.config.schema import EvalParams
from coordexp.errors import DataError
from coordexp.evaluation.categories import MATCHED_BY, NO_CATEGORY, CategoryIndex, MatchedBy, map_descriptions
from coordexp.geometry.boxes import area, as_boxes
from coordexp.records.categories import Category
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import ImageResult, Prediction

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class DetectionTable:
    """Ground truth and predictions of I images; boxes are float pixels xyxy.

    `gt_category_G` and `pred_category_P` are rows of `index.categories` (NO_CATEGORY for a prediction whose description
    maps to none); `pred_name_P` numbers the distinct normalized descriptions, mapped or not.
    """

    index: CategoryIndex
    image_ids_I: Ints
    sizes_wh_I2: Ints
    gt_image_G: Ints
    gt_boxes_G4: Floats
    gt_category_G: Ints
    gt_crowd_G: Bools
    gt_annotated_px2_G: Floats  # annotated area (of the mask), NaN if there is only a box
    pred_image_P: Ints
    pred_boxes_P4: Floats
    pred_category_P: Ints
    pred_name_P: Ints
    pred_score_P: Floats
    candidates: dict[str, Floats]  # (P,) other scores that the file has for every prediction
    found: dict[str, tuple[int, MatchedBy]]  # description -> row of its category, and how it was found

    @property
    def n_images(self) -> int:
        """Number of images, including those without objects or predictions."""
        return len(self.image_ids_I)

    @property
    def gt_area_px2_G(self) -> Floats:
        """The area that decides between COCO's small, medium and large: the annotated one, or that of the box."""
        return np.where(np.isnan(self.gt_annotated_px2_G), area(self.gt_boxes_G4), self.gt_annotated_px2_G)

    @property
    def n_gt_I(self) -> Ints:
        """Annotated objects per image, without crowd regions."""
        return np.bincount(self.gt_image_G[~self.gt_crowd_G], minlength=self.n_images)

    @property
    def n_pred_I(self) -> Ints:
        """Predictions per image."""
        return np.bincount(self.pred_image_P, minlength=self.n_images)

    def keep_predictions(self, keep_P: Bools) -> DetectionTable:
        """The same table with only the predictions where `keep_P` is true."""
        kept = {name: getattr(self, name)[keep_P] for name in _PREDICTION_COLUMNS}
        return replace(self, **kept, candidates={name: scores[keep_P] for name, scores in self.candidates.items()})

    def with_scores(self, score_P: Floats) -> DetectionTable:
        """The same table with other scores."""
        return replace(self, pred_score_P=np.asarray(score_P, dtype=np.float64))


_PREDICTION_COLUMNS = ("pred_image_P", "pred_boxes_P4", "pred_category_P", "pred_name_P", "pred_score_P")


def image_slices(image_N: Ints, n_images: int) -> list[slice]:
    """For each image, the slice of its rows in a column that is grouped by image."""
    ends = np.cumsum(np.bincount(image_N, minlength=n_images)).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def build_table(results: Sequence[ImageResult], categories: Sequence[Category], params: EvalParams) -> DetectionTable:
    """Check the results of a data set and lay them out as arrays; `params` say how descriptions are mapped.

    Raises:
        ConfigError: `params` ask for a mapping by meaning and its text encoder is not installed.
        DataError: no images, a repeated image id, an annotated name outside `categories`, a prediction without a finite
            score, or a box that is not finite or has x2 < x1 or y2 < y1; named by image and index.
    """
    if not results:
        raise DataError("There is nothing to evaluate: no images. Expected at least one line of gt_vs_pred.jsonl.")
    index = CategoryIndex(categories)
    ordered = sorted(results, key=lambda r: r.image_id)
    image_ids = np.array([r.image_id for r in ordered], dtype=np.int64)
    repeated = image_ids[1:][image_ids[1:] == image_ids[:-1]]
    if repeated.size:
        raise DataError(f"Image id {repeated[0]} appears twice; each image is evaluated once.")
    found = map_descriptions({p.desc for r in ordered for p in r.pred}, index, params)
    normalised = {desc: normalise_desc(desc) for desc in found}  # once a description, not once a prediction
    names = {name: number for number, name in enumerate(sorted(set(normalised.values())))}
    return DetectionTable(
        index=index,
        image_ids_I=image_ids,
        sizes_wh_I2=np.array([_size(r) for r in ordered], dtype=np.int64),
        gt_image_G=_repeat([len(r.gt) for r in ordered]),
        gt_boxes_G4=_boxes([(r, "gt", g.bbox_xyxy_px) for r in ordered for g in r.gt]),
        gt_category_G=np.array([_gt_category(r, g.desc, index) for r in ordered for g in r.gt], dtype=np.int64),
        gt_crowd_G=np.array([g.iscrowd for r in ordered for g in r.gt], dtype=bool),
        gt_annotated_px2_G=np.array([g.area_px2 for r in ordered for g in r.gt], dtype=np.float64),  # None becomes NaN
        pred_image_P=_repeat([len(r.pred) for r in ordered]),
        pred_boxes_P4=_boxes([(r, "pred", p.bbox_xyxy_px) for r in ordered for p in r.pred]),
        pred_category_P=np.array([found[p.desc][0] for r in ordered for p in r.pred], dtype=np.int64),
        pred_name_P=np.array([names[normalised[p.desc]] for r in ordered for p in r.pred], dtype=np.int64),
        pred_score_P=np.array([s for r in ordered for s in _scores(r)], dtype=np.float64),
        candidates=_candidates([p for r in ordered for p in r.pred]),
        found=found,
    )


def _repeat(counts: list[int]) -> Ints:
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def _size(result: ImageResult) -> tuple[int, int]:
    if result.width <= 0 or result.height <= 0:
        raise DataError(
            f"Image {result.image_id} ({result.image}): size {result.width}x{result.height} is not positive."
        )
    return result.width, result.height


def _gt_category(result: ImageResult, desc: str, index: CategoryIndex) -> int:
    row, _ = index.lookup(desc)
    if row == NO_CATEGORY:
        raise DataError(
            f"Image {result.image_id} ({result.image}): annotated object {desc!r} is none of the {len(index)} "
            "categories; evaluate with the categories.json of the same data set."
        )
    return row


def _scores(result: ImageResult) -> list[float]:
    scores = [np.nan if p.score is None else p.score for p in result.pred]
    for i, score in enumerate(scores):
        if not np.isfinite(score):
            raise DataError(
                f"Image {result.image_id} ({result.image}): pred[{i}] has score {result.pred[i].score!r}. AP needs a "
                "finite score on every prediction and none is invented; score the file first (decode.score)."
            )
    return scores


def _candidates(preds: Sequence[Prediction]) -> dict[str, Floats]:
    """Every score that all predictions have: those in the file, and those computed from its log-probabilities."""
    shared = set(preds[0].scores).intersection(*(p.scores for p in preds)) if preds else set()
    candidates = {name: np.array([p.scores[name] for p in preds], dtype=np.float64) for name in sorted(shared)}
    if preds and all(p.coord_logprobs is not None for p in preds):
        coord = np.exp(np.array([p.coord_logprobs for p in preds], dtype=np.float64).mean(axis=1))
        candidates.setdefault("coord_logprob", coord)
    if preds and all(p.desc_logprob is not None for p in preds):
        candidates.setdefault("desc_logprob", np.exp(np.array([p.desc_logprob for p in preds], dtype=np.float64)))
    return {name: scores for name, scores in candidates.items() if np.isfinite(scores).all()}


def _boxes(rows: list[tuple[ImageResult, str, tuple[float, float, float, float]]]) -> Floats:
    boxes_N4 = as_boxes([box for _, _, box in rows])
    good_N = np.isfinite(boxes_N4).all(axis=1) & (boxes_N4[:, 2:] >= boxes_N4[:, :2]).all(axis=1)
    if not good_N.all():
        result, side, box = rows[int(np.argmin(good_N))]
        raise DataError(
            f"Image {result.image_id} ({result.image}): {side} box {box!r}, "
            "expected four finite pixels with x2 >= x1 and y2 >= y1."
        )
    return boxes_N4


_OUTSIDE_PX = 1.0  # tolerance for boxes outside their image: rounding


@dataclass(frozen=True, slots=True)
class BadInput:
    """One kind of bad input and its handling."""

    what: str
    outcome: str  # the error's words, or the metric that counts it
    why: str


BAD_INPUT = (
    BadInput("empty file", "error: no predictions in the file", "there is nothing to evaluate"),
    BadInput("truncated last line", "error: not valid JSON, by line", "images would be missing silently"),
    BadInput("line that is not JSON, or lacks a key", "error, by file and line", "the file was edited or mixed up"),
    BadInput("repeated image", "error: image id appears twice", "it would count twice"),
    BadInput("image that is not in the annotations", "error: image id is not in the annotations", "wrong split"),
    BadInput(
        "annotated name that is not a category", "error: annotated object is none of the categories", "wrong list"
    ),
    BadInput("box with NaN or infinity", "error, by file and line", "comparisons with it are meaningless"),
    BadInput("box with x2 < x1 or y2 < y1", "error, by file and line", "the parser already drops and counts these"),
    BadInput("invalid annotated area", "error, by file and line", "it decides which objects are small or large"),
    BadInput("prediction without a finite score", "error: AP needs a finite score", "a score is never invented"),
    BadInput("box with zero area", "`input.zero_area_boxes`; evaluated, overlaps nothing", "a model may answer it"),
    BadInput(
        "box outside its image by over 1 px", "`input.outside_boxes`; evaluated unchanged", "a model may answer it"
    ),
    BadInput("description with control characters", "`input.control_char_descs`; they become spaces", "as above"),
    BadInput("empty description", "`input.empty_descs`; evaluated as unmapped", "as above"),
    BadInput("description that is not a category", "`input.names_unmapped`; evaluated, incorrect name", "as above"),
    BadInput(
        "description equally near to two categories", "`input.names_ambiguous`; evaluated, incorrect name", "as above"
    ),
    BadInput("score outside [0, 1]", "`input.scores_outside_unit`; ranked, but no ECE", "not a probability"),
)


def check_known_images(results: Sequence[ImageResult], known_ids: Set[int], where: str) -> None:
    """Raise DataError unless the annotations in `where` contain every image of the results."""
    unknown = sorted(r.image_id for r in results if r.image_id not in known_ids)
    if unknown:
        raise DataError(
            f"Image id {unknown[0]} is not in the annotations {where} ({len(unknown)} such images of {len(results)}); "
            "use the annotations of the split of the predictions."
        )


def input_metrics(results: Sequence[ImageResult], table: DetectionTable) -> dict[str, int]:
    """The `input` area of the metrics: predictions by the way their name was mapped, and counts of odd ones."""
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
