"""From parsed answers with distributions to predictions: the box by `decode.box`, the score by `decode.score`.

This needs no model, so another readout or score takes seconds on stored answers.

Shapes: N objects of one answer, 4 coordinates x1, y1, x2, y2, K bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coordexp.config.paths import DECODE_SUMMARY, GT_VS_PRED
from coordexp.config.schema import DecodeParams, ReadoutRule
from coordexp.errors import DataError
from coordexp.geometry.bins import NUM_BINS, decode_boxes
from coordexp.geometry.boxes import Box
from coordexp.infra.artefacts import sealing, verified
from coordexp.infra.files import replacing
from coordexp.infra.foreign import Gate
from coordexp.infra.provenance import write_json
from coordexp.losses.readout import read
from coordexp.records.gt_vs_pred import ImageResult, read_results, write_results
from coordexp.rollout.confidence import DISTRIBUTIONAL, Evidence, score_objects, slot_sd

# `straight_through` is missing because it differs from `argmax` only in its gradient.
BOX_RULES: tuple[ReadoutRule, ...] = ("argmax", "expectation", "local_expectation", "top_k", "median")
ANSWERS, DISTRIBUTIONS = "answers.jsonl", "distributions.npy"
SUMMARY = Gate("the summary that decoding writes", DataError, "Decode again.")


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """One parsed answer: `result` has the emitted boxes without scores, `probs_N4K` the distributions at coordinates.

    The distributions are float16 and sum to 1 up to rounding; None for a codec without bins.
    """

    result: ImageResult
    probs_N4K: NDArray[np.float16] | None


def readable(decode: DecodeParams, has_distributions: bool) -> DecodeParams:
    """The parameters adapted to the codec: numbers spelled in digits have no distributions, so argmax applies."""
    if has_distributions:
        return decode
    score = "coord_logprob" if decode.score in DISTRIBUTIONAL else decode.score
    return decode.model_copy(update={"box": "argmax", "score": score})


def scored(decoded: Decoded, decode: DecodeParams) -> ImageResult:
    """The answer with its boxes under every readout rule, and its scores under every scheme that its codec allows."""
    result, probs_N4K = decoded.result, _normalised(decoded.probs_N4K)
    decode = readable(decode, probs_N4K is not None)
    emitted_N4 = np.array([p.bins for p in result.pred], np.float64).reshape(-1, 4)
    bins_by_rule: dict[str, NDArray[np.float64]] = {"argmax": emitted_N4}
    if probs_N4K is not None:
        bins_by_rule = {rule: read_bins(rule, emitted_N4, probs_N4K, decode.box_top_k) for rule in BOX_RULES}
    evidence = Evidence(
        coord_logprobs_N4=np.array([p.coord_logprobs for p in result.pred], np.float64).reshape(-1, 4),
        desc_logprob_N=np.array([p.desc_logprob for p in result.pred], np.float64),
        boxes_N4=bins_by_rule[decode.box],
        probs_N4K=probs_N4K,
    )
    scores = score_objects(evidence)
    sd_N4 = None if probs_N4K is None else slot_sd(probs_N4K)
    boxes = {rule: decode_boxes(bins, result.width, result.height) for rule, bins in bins_by_rule.items()}
    pred = tuple(
        replace(
            prediction,
            bbox_xyxy_px=as_box(boxes[decode.box][i]),
            score=float(scores[decode.score][i]),
            coord_sd_bins=None if sd_N4 is None else as_box(sd_N4[i]),
            boxes_xyxy_px={rule: as_box(box_N4[i]) for rule, box_N4 in boxes.items()},
            scores={name: float(score_N[i]) for name, score_N in scores.items()},
        )
        for i, prediction in enumerate(result.pred)
    )
    return replace(result, pred=pred)


def _normalised(probs_N4K: NDArray[np.float16] | None) -> NDArray[np.float32] | None:
    if probs_N4K is None:
        return None
    probs = probs_N4K.astype(np.float32)
    return probs / probs.sum(axis=-1, keepdims=True)


def read_bins(
    rule: ReadoutRule, emitted_N4: NDArray[np.float64], probs_N4K: NDArray[np.floating], top_k: int
) -> NDArray[np.float64]:
    """(N, 4) boxes in fractional bins under one of `BOX_RULES`, within [0, K - 1].

    A bin is 0.1 % of the image side. The distribution around the emitted bin locates the edge with a finer resolution.
    An axis on which a rule would invert the box (x2 <= x1, which two broad distributions can cause) keeps its emitted
    bins.

    Args:
        rule: a name in `BOX_RULES`; `argmax` means the emitted bins.
        emitted_N4: the emitted bins, 0..K-1.
        probs_N4K: the distribution at each slot; sums to 1 over K.
        top_k: number of bins that the rule `top_k` keeps.
    """
    probs = torch.from_numpy(probs_N4K).double()
    bins_K = torch.arange(probs.shape[-1], dtype=torch.float64)
    read_N4 = read(rule, probs, bins_K, top_k, torch.from_numpy(emitted_N4).long()).numpy()
    turned_N2 = read_N4[:, 2:] <= read_N4[:, :2]
    return np.where(np.tile(turned_N2, 2), emitted_N4, read_N4)


def as_box(values: Sequence[float] | NDArray) -> Box:
    """Four values in pixels or bins, rounded to the precision of files."""
    x1, y1, x2, y2 = (round(float(v), 4) for v in values)
    return x1, y1, x2, y2


def write_decoded(folder: Path, decoded: Sequence[Decoded], summary: dict[str, Any]) -> None:
    """Write answers as lines, their distributions as one array in the same order, and the summary of decoding."""
    held = [answer.probs_N4K for answer in decoded if answer.probs_N4K is not None]
    with sealing(folder):
        write_results(folder / ANSWERS, [answer.result for answer in decoded])
        if held:
            with replacing(folder / DISTRIBUTIONS) as temporary, temporary.open("wb") as out:
                np.save(out, np.concatenate(held))
        write_json(folder / DECODE_SUMMARY, summary)


def read_decoded(folder: Path) -> Iterator[Decoded]:
    """The answers that `write_decoded` wrote; raises DataError if answers and distributions do not match."""
    path, at = verified(folder / DISTRIBUTIONS), 0
    probs = _mapped(path) if path.is_file() else None
    for result in read_results(folder / ANSWERS):
        end = at + len(result.pred)
        yield Decoded(result, None if probs is None else np.asarray(probs[at:end]))
        at = end
    if probs is not None and at != len(probs):
        raise DataError(
            f"{path}: holds the distributions of {len(probs)} objects, but {ANSWERS} has {at} objects. Decode again."
        )


def _mapped(path: Path) -> NDArray[np.float16]:
    try:
        probs = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it was truncated or edited. Decode again.") from error
    if probs.dtype != np.float16 or probs.shape[1:] != (4, NUM_BINS):
        raise DataError(
            f"{path}: holds {probs.dtype} {probs.shape}, expected float16 (objects, 4, {NUM_BINS}). Decode again."
        )
    return probs


def score_folder(folder: Path, decode: DecodeParams, out: Path) -> None:
    """Turn stored answers into the predictions file of the evaluation, and copy the summary of decoding."""
    out.mkdir(parents=True, exist_ok=True)
    write_results(out / GT_VS_PRED, (scored(decoded, decode) for decoded in read_decoded(folder)))
    write_json(out / DECODE_SUMMARY, read_summary(folder))


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of decoding: checkpoint, codec, identity, settings, images, tokens."""
    return SUMMARY.read_object(folder / DECODE_SUMMARY)
