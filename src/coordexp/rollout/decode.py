"""From generations to parsed answers: the emitted objects, the model's probabilities for them, and the annotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.geometry.bins import decode_boxes
from coordexp.packing.samples import Sample
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, Prediction
from coordexp.rollout.engine import Generation
from coordexp.rollout.rescore import Rescored
from coordexp.rollout.scoring import Decoded, as_box
from coordexp.text.parser import ParsedAnswer, ParsedObject, parse_answer
from coordexp.text.symbols import TokenTable


@dataclass(frozen=True, slots=True)
class AnswerReader:
    """Parses the answers of one model; `identity` goes into every line."""

    table: TokenTable
    codec: str
    identity: dict[str, str]

    def parse(self, generation: Generation) -> ParsedAnswer:
        """Strict parse of one generation."""
        return parse_answer(generation.ids, self.table, self.codec)

    def decoded(self, sample: Sample, generation: Generation, rescored: Rescored, text: str) -> Decoded:
        """One parsed answer with the probabilities that scores need; `text` is the readable form."""
        answer = self.parse(generation)
        result = ImageResult(
            image_id=sample.image_id,
            image=sample.image,
            width=sample.width,
            height=sample.height,
            gt=ground_truth(sample),
            pred=_emitted(answer.objects, sample, rescored.logprobs_A, self.codec),
            raw_text=text,
            parse=answer.report,
            finish_reason=generation.finish_reason,
            n_generated_tokens=len(generation.ids),
            identity=self.identity,
            probe=sample.probe,
            asked=sample.asked,
        )
        return Decoded(result, None if self.codec == "digits" else rescored.coord_probs_N4K)


def ground_truth(sample: Sample) -> tuple[GroundTruth, ...]:
    """The annotations of a sample."""
    areas_px2 = sample.areas_px2 or (None,) * len(sample.descs)
    columns = (sample.descs, sample.boxes_xyxy_px, sample.iscrowd, areas_px2)
    return tuple(GroundTruth(desc, as_box(box), crowd, px2) for desc, box, crowd, px2 in zip(*columns, strict=True))


def coord_positions(answer: ParsedAnswer) -> NDArray[np.int64]:
    """(N, 4) positions of the coordinate tokens in the answer."""
    return np.array([o.coord_positions for o in answer.objects], np.int64).reshape(-1, 4)


def _emitted(
    objects: Sequence[ParsedObject], sample: Sample, logprobs_A: NDArray[np.float64], codec: str
) -> tuple[Prediction, ...]:
    """Parsed objects with their emitted boxes and log-probabilities, without scores.

    A coordinate written in digits has one token per digit; its log-probability is the sum over these tokens.
    """
    emitted_N4 = np.array([o.bins for o in objects], np.float64).reshape(-1, 4)
    boxes_N4 = decode_boxes(emitted_N4, sample.width, sample.height)
    predictions = []
    for obj, box in zip(objects, boxes_N4, strict=True):
        lengths = [len(str(value)) if codec == "digits" else 1 for value in obj.bins]
        spans = zip(obj.coord_positions, lengths, strict=True)
        x1, y1, x2, y2 = (float(logprobs_A[p : p + n].sum()) for p, n in spans)
        start, end = obj.desc_span
        predictions.append(
            Prediction(
                desc=obj.desc,
                bbox_xyxy_px=as_box(box),
                bins=obj.bins,
                coord_logprobs=(x1, y1, x2, y2),
                desc_logprob=float(logprobs_A[start:end].mean()),
            )
        )
    return tuple(predictions)
