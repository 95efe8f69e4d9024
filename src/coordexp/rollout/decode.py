"""From generations to `gt_vs_pred` lines: parse, decoded boxes to pixels, statistics of the coordinates, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from coordexp.config.schema import DecodeParams, ReadoutRule
from coordexp.geometry.bins import decode_boxes
from coordexp.geometry.boxes import Box
from coordexp.losses.readout import read
from coordexp.packing.samples import Sample
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, Prediction
from coordexp.rollout.confidence import DISTRIBUTIONAL, Evidence, score_objects, slot_sd
from coordexp.rollout.engine import Generation
from coordexp.rollout.rescore import Rescored
from coordexp.text.parser import ParsedAnswer, ParsedObject, parse_answer
from coordexp.text.symbols import TokenTable

# `straight_through` reads what `argmax` reads: the rules differ in their gradients alone.
BOX_RULES: tuple[ReadoutRule, ...] = ("argmax", "expectation", "local_expectation", "top_k", "median")


def readable(decode: DecodeParams, codec: str) -> DecodeParams:
    """What is possible: numbers spelled in digits have no distribution over bins, so the emitted ones count."""
    if codec != "digits":
        return decode
    score = "coord_logprob" if decode.score in DISTRIBUTIONAL else decode.score
    return decode.model_copy(update={"box": "argmax", "score": score})


@dataclass(frozen=True, slots=True)
class AnswerReader:
    """How to read this model's answers; `decode` chooses box and score, `identity` goes into every line."""

    table: TokenTable
    codec: str
    identity: dict[str, str]
    decode: DecodeParams

    def parse(self, generation: Generation) -> ParsedAnswer:
        """Strict parse of one generation."""
        return parse_answer(generation.ids, self.table, self.codec)

    def result(self, sample: Sample, generation: Generation, rescored: Rescored, text: str) -> ImageResult:
        """One line of the hand-over file; `text` is for people to read."""
        answer = self.parse(generation)
        return ImageResult(
            image_id=sample.image_id,
            image=sample.image,
            width=sample.width,
            height=sample.height,
            gt=ground_truth(sample),
            pred=to_predictions(answer.objects, sample, rescored, self.codec, self.decode),
            raw_text=text,
            parse=answer.report,
            finish_reason=generation.finish_reason,
            n_generated_tokens=len(generation.ids),
            identity=self.identity,
        )


def ground_truth(sample: Sample) -> tuple[GroundTruth, ...]:
    """The annotations of a sample."""
    areas_px2 = sample.areas_px2 or (None,) * len(sample.descs)
    columns = (sample.descs, sample.boxes_xyxy_px, sample.iscrowd, areas_px2)
    return tuple(GroundTruth(desc, _box(box), crowd, px2) for desc, box, crowd, px2 in zip(*columns, strict=True))


def coord_positions(answer: ParsedAnswer) -> NDArray[np.int64]:
    """The answer tokens that are coordinates, (N, 4)."""
    return np.array([o.coord_positions for o in answer.objects], np.int64).reshape(-1, 4)


def to_predictions(
    objects: Sequence[ParsedObject], sample: Sample, rescored: Rescored, codec: str, decode: DecodeParams
) -> tuple[Prediction, ...]:
    """Parsed objects with their boxes under every rule, and their scores under every scheme that the codec allows.

    A coordinate written as digits spans one token a digit: its log-probability is their sum.
    """
    decode = readable(decode, codec)
    emitted_N4 = np.array([o.bins for o in objects], np.float64).reshape(-1, 4)
    probs_N4K = rescored.coord_probs_N4K
    bins_by_rule: dict[str, NDArray[np.float64]] = {"argmax": emitted_N4}
    if probs_N4K is not None:
        bins_by_rule = {rule: read_bins(rule, emitted_N4, probs_N4K, decode.box_top_k) for rule in BOX_RULES}
    coord_logprobs_N4, desc_logprob_N = _logprobs(objects, rescored.logprobs_A, codec)
    evidence = Evidence(coord_logprobs_N4, desc_logprob_N, bins_by_rule[decode.box], probs_N4K)
    scores = score_objects(evidence)
    sd_N4 = None if probs_N4K is None else slot_sd(probs_N4K)
    boxes = {rule: decode_boxes(bins, sample.width, sample.height) for rule, bins in bins_by_rule.items()}
    return tuple(
        Prediction(
            desc=obj.desc,
            bbox_xyxy_px=_box(boxes[decode.box][i]),
            bins=obj.bins,
            coord_logprobs=tuple(coord_logprobs_N4[i].tolist()),
            desc_logprob=float(desc_logprob_N[i]),
            score=float(scores[decode.score][i]),
            coord_sd_bins=None if sd_N4 is None else _box(sd_N4[i]),
            boxes_xyxy_px={rule: _box(box_N4[i]) for rule, box_N4 in boxes.items()},
            scores={name: float(score_N[i]) for name, score_N in scores.items()},
        )
        for i, obj in enumerate(objects)
    )


def read_bins(
    rule: ReadoutRule, emitted_N4: NDArray[np.float64], probs_N4K: NDArray[np.floating], top_k: int
) -> NDArray[np.float64]:
    """Boxes in bins under one of `BOX_RULES`, fractional, shape (N, 4), within [0, K - 1].

    A bin is 0.1 % of the image side; the distribution round the emitted one says where inside and beside it the edge
    lies. An axis on which a rule would turn the box over (x2 <= x1, as two broad distributions can) keeps its emitted
    bins.

    Args:
        rule: a name of `BOX_RULES`; `argmax` is the emitted bins as they are.
        emitted_N4: the emitted bins, 0..K-1.
        probs_N4K: the distribution at each slot; sums to 1 over K.
        top_k: bins that `top_k` keeps.
    """
    probs = torch.from_numpy(probs_N4K).double()
    bins_K = torch.arange(probs.shape[-1], dtype=torch.float64)
    read_N4 = read(rule, probs, bins_K, top_k, torch.from_numpy(emitted_N4).long()).numpy()
    turned_N2 = read_N4[:, 2:] <= read_N4[:, :2]
    return np.where(np.tile(turned_N2, 2), emitted_N4, read_N4)


def _logprobs(
    objects: Sequence[ParsedObject], logprobs_A: NDArray[np.float64], codec: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities of the four coordinates (N, 4), and mean over the name's tokens (N,)."""
    coords, descs = [], []
    for obj in objects:
        lengths = [len(str(value)) if codec == "digits" else 1 for value in obj.bins]
        coords.append([logprobs_A[p : p + n].sum() for p, n in zip(obj.coord_positions, lengths, strict=True)])
        start, end = obj.desc_span
        descs.append(logprobs_A[start:end].mean())
    return np.array(coords).reshape(-1, 4), np.array(descs)


def _box(values: Sequence[float] | NDArray) -> Box:
    x1, y1, x2, y2 = (round(float(v), 4) for v in values)
    return x1, y1, x2, y2
