"""`gt_vs_pred.jsonl`: the predictions file, the only interface between decoding, scoring, evaluation and drawing.

One JSON line per image: ground truth, predictions in generation order, raw text, parse counters, finish reason, and the
identity of model, prompt and decode settings. Boxes are float pixels xyxy, never rounded to integers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.infra.files import replacing
from coordexp.infra.foreign import Gate, first_fault
from coordexp.records.schema import LARGEST_AREA_PX2, as_flag

GT_VS_PRED = Gate(
    "a gt_vs_pred line, as decoding writes it", DataError, "If the file was truncated or edited, decode again."
)
LARGEST_PX = 1e9  # maximum coordinate; beyond it, areas lose precision or overflow


def _ordered(box: Box) -> Box:
    x1, y1, x2, y2 = box
    if x2 < x1 or y2 < y1 or max(map(abs, box)) > LARGEST_PX:
        raise ValueError("expected pixels [x1, y1, x2, y2] with x2 >= x1 and y2 >= y1")
    return box


def _flag(value: object) -> bool:
    if (flag := as_flag(value)) is None:
        raise ValueError("expected 0 or 1")
    return flag


# Constraints in these annotations are checked when a line is read, not when an object is created.
Count = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=1, lt=2**31)]
Bin = Annotated[int, Field(ge=-(2**31), lt=2**31)]
OrderedBox = Annotated[Box, AfterValidator(_ordered)]


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """One annotated object; `area_px2` is the annotated area of its mask, None if only the box is known."""

    desc: str
    bbox_xyxy_px: OrderedBox
    iscrowd: Annotated[bool, BeforeValidator(_flag)] = False
    area_px2: Annotated[float, Field(ge=0, le=LARGEST_AREA_PX2)] | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One parsed object of the answer.

    `bins` are the four emitted bins (digits codec: the emitted numbers), None for a detector without bins.
    `coord_logprobs` are log p of the four emitted coordinates at temperature 1; `desc_logprob` is the mean over the
    description's tokens. `score` is None until scored; evaluation rejects None for AP and never invents a score.

    `coord_sd_bins` are the standard deviations of the distributions at the four slots (None for digits).
    `boxes_xyxy_px` and `scores` contain the alternatives by the values of `decode.box` and `decode.score`; one of each
    is also in `bbox_xyxy_px` and `score`. They allow comparing readouts without decoding again.
    """

    desc: str
    bbox_xyxy_px: OrderedBox
    bins: tuple[Bin, Bin, Bin, Bin] | None = None
    coord_logprobs: tuple[float, float, float, float] | None = None
    desc_logprob: float | None = None
    score: float | None = None
    coord_sd_bins: tuple[float, float, float, float] | None = None
    boxes_xyxy_px: dict[str, OrderedBox] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParseReport:
    """What the strict parser did with one answer; the sum of `dropped` is the number of dropped objects."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    container_found: bool
    n_valid: Count
    dropped: dict[str, Count] = field(default_factory=dict)
    truncated: bool = False

    @property
    def ok(self) -> bool:
        """Whether the answer is complete: container found, not truncated, nothing dropped."""
        return self.container_found and not self.truncated and not self.dropped


@dataclass(frozen=True, slots=True)
class ImageResult:
    """One image: ground truth, predictions, and the generated text with its parse report.

    A detector that does not generate text has an empty text and no `parse`.
    """

    image_id: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    image: str
    width: Size
    height: Size
    gt: tuple[GroundTruth, ...]
    pred: tuple[Prediction, ...]
    raw_text: str = ""
    parse: ParseReport | None = None
    finish_reason: str = "stop"  # end token; or "length": token budget
    n_generated_tokens: Count = 0
    identity: dict[str, str] = field(default_factory=dict)  # short hashes: model, prompt, decode
    probe: str = ""  # kind of an additional prompt for the same image (`records.mixing`); "" for its main line
    asked: tuple[str, ...] = ()  # the category names that a probe lists

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; inverse of `read_results`."""
        row = asdict(self)
        if not self.probe:
            del row["probe"], row["asked"]
        for obj in row["gt"]:
            if obj["area_px2"] is None:
                del obj["area_px2"]
        return row


_LINE = TypeAdapter(ImageResult)


def read_results(path: Path) -> Iterator[ImageResult]:
    """Yield the lines of a gt_vs_pred file.

    Raises:
        DataError: a value is missing or has another type, a box is not finite or not ordered, an image id is repeated,
            or the file is empty or missing; the message has file, line and key.
    """
    seen: set[int] = set()
    for where, line in GT_VS_PRED.lines(path):
        GT_VS_PRED.parse_json(line, where)  # strict JSON first: pydantic's parser accepts duplicate keys
        try:
            result = _LINE.validate_json(line, strict=True)
        except ValidationError as error:
            GT_VS_PRED.refuse(where, first_fault(error.errors()), error)
        if result.image_id in seen:
            raise DataError(f"{where}: image id {result.image_id} appears twice; each image is evaluated once.")
        seen.add(result.image_id)
        yield result
    if not seen:
        raise DataError(f"{path}: no predictions in the file; expected one JSON line per image.")


def own_lines(results: Iterable[ImageResult]) -> list[ImageResult]:
    """The results without probes: one line per image."""
    return [result for result in results if not result.probe]


def write_results(path: Path, results: Iterable[ImageResult]) -> int:
    """Write one line per image and return their number."""
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for result in results:
            out.write(json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count
