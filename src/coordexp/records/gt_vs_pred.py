"""`gt_vs_pred.jsonl`: the one hand-over between decoding, scoring, evaluating and drawing.

One JSON line per image: ground truth, predictions in generation order, raw text, parse counters, finish reason, and the
identity of model, prompt and decode settings. Boxes are float pixels xyxy, never rounded to integers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.geometry.boxes import Box
from coordexp.infra.files import replacing
from coordexp.records.schema import checked_area_px2, checked_flag


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """One annotated object; `area_px2` is the annotated area (the mask's), None where only the box's is known."""

    desc: str
    bbox_xyxy_px: tuple[float, float, float, float]
    iscrowd: bool = False
    area_px2: float | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One parsed object of the answer.

    `bins` are the four emitted bins (digits codec: the emitted numbers). `coord_logprobs` are log p of the four emitted
    coordinates at temperature 1, `desc_logprob` the mean over the description's tokens.
    `score` is None until scored; evaluation refuses that for AP, it never invents one.

    `coord_sd_bins` are the standard deviations of the distributions at the four slots (None for digits).
    `boxes_xyxy_px` and `scores` hold the alternatives by the names of `decode.box` and `decode.score`; one of each is
    what `bbox_xyxy_px` and `score` say. They let settings be compared without decoding again.
    """

    desc: str
    bbox_xyxy_px: Box
    bins: tuple[int, int, int, int]
    coord_logprobs: tuple[float, float, float, float] | None = None
    desc_logprob: float | None = None
    score: float | None = None
    coord_sd_bins: tuple[float, float, float, float] | None = None
    boxes_xyxy_px: dict[str, Box] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParseReport:
    """What the strict parser did with one answer; the sum of `dropped` is the number of dropped objects."""

    container_found: bool
    n_valid: int
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: bool = False

    @property
    def ok(self) -> bool:
        """A whole answer: container found, not truncated, nothing dropped."""
        return self.container_found and not self.truncated and not self.dropped


@dataclass(frozen=True, slots=True)
class ImageResult:
    """One image: what is there, what was predicted, and how the text came out."""

    image_id: int
    image: str
    width: int
    height: int
    gt: tuple[GroundTruth, ...]
    pred: tuple[Prediction, ...]
    raw_text: str
    parse: ParseReport
    finish_reason: str  # "stop" (end token) or "length" (token budget)
    n_generated_tokens: int
    identity: dict[str, str] = field(default_factory=dict)  # short hashes: model, prompt, decode
    probe: str = ""  # a further question about an image that has its own line (`records.mixing`); "": its own line
    asked: tuple[str, ...] = ()  # the names that a probe lists

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; inverse of `result_from_json`."""
        row = asdict(self)
        if not self.probe:
            del row["probe"], row["asked"]
        for obj in row["gt"]:
            if obj["area_px2"] is None:
                del obj["area_px2"]
        return row


def result_from_json(row: dict[str, Any], where: str) -> ImageResult:
    """Rebuild one line.

    Raises:
        DataError: naming `where`: a key is missing, a box is not finite or not ordered, or an area cannot be one.
    """
    try:
        gt = tuple(
            GroundTruth(
                desc=o["desc"],
                bbox_xyxy_px=_box(o["bbox_xyxy_px"], where),
                iscrowd=checked_flag(o.get("iscrowd"), f"{where}: gt[{i}].iscrowd"),
                area_px2=checked_area_px2(o.get("area_px2"), f"{where}: gt[{i}]"),
            )
            for i, o in enumerate(row["gt"])
        )
        pred = tuple(
            Prediction(
                desc=o["desc"],
                bbox_xyxy_px=_box(o["bbox_xyxy_px"], where),
                bins=tuple(o["bins"]),
                coord_logprobs=_optional_tuple(o.get("coord_logprobs")),
                desc_logprob=o.get("desc_logprob"),
                score=o.get("score"),
                coord_sd_bins=_optional_tuple(o.get("coord_sd_bins")),
                boxes_xyxy_px={rule: _box(box, where) for rule, box in o.get("boxes_xyxy_px", {}).items()},
                scores=dict(o.get("scores", {})),
            )
            for o in row["pred"]
        )
        return ImageResult(
            image_id=int(row["image_id"]),
            image=row["image"],
            width=int(row["width"]),
            height=int(row["height"]),
            gt=gt,
            pred=pred,
            raw_text=row["raw_text"],
            parse=ParseReport(**row["parse"]),
            finish_reason=row["finish_reason"],
            n_generated_tokens=int(row["n_generated_tokens"]),
            identity=dict(row.get("identity", {})),
            probe=str(row.get("probe", "")),
            asked=tuple(row.get("asked", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: not a gt_vs_pred line ({error!r}); it needs the keys that `rollout` writes."
        ) from error


def _optional_tuple(values: Any) -> Any:
    return None if values is None else tuple(values)


def _box(values: Any, where: str) -> Box:
    box = tuple(float(v) for v in values)
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[2] < box[0] or box[3] < box[1]:
        raise DataError(
            f"{where}: box {values!r}, expected four finite pixels [x1, y1, x2, y2] with x2 >= x1 and y2 >= y1."
        )
    return box


def read_results(path: Path) -> Iterator[ImageResult]:
    """Yield the lines of a gt_vs_pred file; refuses an empty file, a broken line and a repeated image id."""
    seen: set[int] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                cut = "" if line.endswith(b"\n") else "the last line is cut: "
                raise DataError(
                    f"{where}: {cut}not valid JSON ({error}); the file was cut or edited. Decode again."
                ) from error
            result = result_from_json(row, where)
            if result.image_id in seen:
                raise DataError(f"{where}: image id {result.image_id} appears twice; each image is evaluated once.")
            seen.add(result.image_id)
            yield result
    if not seen:
        raise DataError(f"{path}: no predictions in the file; expected one JSON line per image.")


def own_lines(results: Iterable[ImageResult]) -> list[ImageResult]:
    """Without the probes: one line an image."""
    return [result for result in results if not result.probe]


def write_results(path: Path, results: Iterable[ImageResult]) -> int:
    """Write one line per image and return their number."""
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for result in results:
            out.write(json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count
