"""From generations to `gt_vs_pred` lines: parse, bins to pixels, per-object log-probabilities, score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.geometry.bins import decode_boxes
from coordexp.packing.samples import Sample
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, Prediction
from coordexp.rollout.engine import Generation
from coordexp.text.parser import ParsedAnswer, ParsedObject, parse_answer
from coordexp.text.symbols import TokenTable


@dataclass(frozen=True, slots=True)
class AnswerReader:
    """How to read this model's answers: token table, codec, and the identity that goes into every line."""

    table: TokenTable
    codec: str
    identity: dict[str, str]

    def parse(self, generation: Generation) -> ParsedAnswer:
        """Strict parse of one generation."""
        return parse_answer(generation.ids, self.table, self.codec)

    def result(self, sample: Sample, generation: Generation, logprobs: NDArray[np.float64], text: str) -> ImageResult:
        """One line of the hand-over file. `logprobs` are per generated token, `text` is for people to read."""
        answer = self.parse(generation)
        return ImageResult(
            image_id=sample.image_id,
            image=sample.image,
            width=sample.width,
            height=sample.height,
            gt=ground_truth(sample),
            pred=tuple(to_prediction(obj, sample, logprobs, self.codec) for obj in answer.objects),
            raw_text=text,
            parse=answer.report,
            finish_reason=generation.finish_reason,
            n_generated_tokens=len(generation.ids),
            identity=self.identity,
        )


def ground_truth(sample: Sample) -> tuple[GroundTruth, ...]:
    """The annotations of a sample."""
    return tuple(
        GroundTruth(desc, _box(box), crowd)
        for desc, box, crowd in zip(sample.descs, sample.boxes_xyxy_px, sample.iscrowd, strict=True)
    )


def to_prediction(obj: ParsedObject, sample: Sample, logprobs: NDArray[np.float64], codec: str) -> Prediction:
    """A parsed object with its pixels and log-probabilities.

    A coordinate written as digits spans one token a digit: its log-probability is their sum. The score is the geometric
    mean of the four coordinate probabilities, in (0, 1].
    """
    lengths = [len(str(value)) if codec == "digits" else 1 for value in obj.bins]
    coords = tuple(float(logprobs[p : p + n].sum()) for p, n in zip(obj.coord_positions, lengths, strict=True))
    start, end = obj.desc_span
    return Prediction(
        desc=obj.desc,
        bbox_xyxy_px=_box(decode_boxes(obj.bins, sample.width, sample.height)),
        bins=obj.bins,
        coord_logprobs=coords,  # type: ignore[arg-type]
        desc_logprob=float(logprobs[start:end].mean()),
        score=math.exp(sum(coords) / 4),
    )


def _box(values: Sequence[float] | NDArray) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (round(float(v), 4) for v in values)
    return x1, y1, x2, y2
