"""Rollouts: the model's answers on training images. Files hold token ids; stage 2 parses and matches them in memory.

Parsing and matching depend on parameters of stage 2, so their results are not stored.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.config.schema import MatchingParams
from coordexp.errors import DataError
from coordexp.geometry.bins import box_scale, decode_norm
from coordexp.infra.files import replacing
from coordexp.infra.foreign import Gate, shown
from coordexp.matching.matcher import match_images
from coordexp.matching.summary import MatchCounts, rounded_ratio
from coordexp.packing.samples import Sample
from coordexp.records.gt_vs_pred import ParseReport
from coordexp.rollout.engine import Generation
from coordexp.text.meaning import name_distance
from coordexp.text.parser import ParsedAnswer

log = logging.getLogger(__name__)
MOST_UNUSABLE = 0.1
GENERATIONS = Gate("rollouts as the stage `rollout` writes them", DataError, "Run that stage again.")


@dataclass(frozen=True, slots=True)
class RolloutObject:
    """A parsed object of a rollout: name, bins, and the positions of its coordinates among the generated tokens."""

    desc: str
    bins: tuple[int, int, int, int]
    coord_positions: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout after the E-step. `pairs` are the accepted (prediction, ground truth) indices, from 0.

    `usable` is False if the parser found no container; stage 2 then uses the ground truth for this sample.
    """

    image_id: int
    ids: tuple[int, ...]
    finish_reason: str
    usable: bool
    objects: tuple[RolloutObject, ...]
    pairs: tuple[tuple[int, int], ...]
    pair_ious: tuple[float, ...]


def parsed_rollout(image_id: int, generation: Generation, answer: ParsedAnswer) -> Rollout:
    """A generation with its parsed objects, before matching."""
    return Rollout(
        image_id=image_id,
        ids=tuple(generation.ids.tolist()),
        finish_reason=generation.finish_reason,
        usable=answer.report.container_found,
        objects=tuple(RolloutObject(o.desc, o.bins, o.coord_positions) for o in answer.objects),
        pairs=(),
        pair_ious=(),
    )


def match_rollouts(rollouts: Sequence[Rollout], samples: Sequence[Sample], matching: MatchingParams) -> list[Rollout]:
    """Match each rollout to the non-crowd ground truth of its sample; previous pairs are replaced.

    Stage 2 does this in each step, because the threshold and costs may follow a curriculum.
    """
    pred, gt, distances = [], [], []
    for rollout, sample in zip(rollouts, samples, strict=True):
        keep = [i for i, crowd in enumerate(sample.iscrowd) if not crowd]
        pred.append(decode_norm([o.bins for o in rollout.objects]))
        gt.append(sample.boxes_xyxy_px[keep].astype(np.float64) / box_scale(sample.width, sample.height))
        if matching.lambda_sem > 0:
            names = [o.desc for o in rollout.objects], [sample.descs[i] for i in keep]
            distances.append(name_distance(*names, matching.semantic))
    found = match_images(pred, gt, matching, distances or None)
    return [
        replace(
            rollout,
            pairs=tuple((i, j) for i, j in result.pairs.tolist()),
            pair_ious=tuple(round(v, 4) for v in result.iou_P.tolist()),
        )
        for rollout, result in zip(rollouts, found, strict=True)
    ]


def rollout_summary(
    samples: Sequence[Sample], rollouts: Sequence[Rollout], reports: Sequence[ParseReport]
) -> dict[str, Any]:
    """Counts and matching F1 of matched rollouts; ratios are sums over sums, None if the denominator is 0."""
    counts = MatchCounts(
        n_pred=sum(len(r.objects) for r in rollouts),
        n_gt=sum(len(s.descs) - sum(s.iscrowd) for s in samples),
        n_matched=sum(len(r.pairs) for r in rollouts),
        iou_sum=float(sum(sum(r.pair_ious) for r in rollouts)),
    )
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
    tokens = [len(r.ids) for r in rollouts]
    return {
        "images": len(rollouts),
        "precision": rounded_ratio(counts.precision),
        "recall": rounded_ratio(counts.recall),
        "f1": rounded_ratio(counts.f1),
        "matched_iou_mean": rounded_ratio(counts.matched_iou_mean),
        "n_pred": counts.n_pred,
        "n_gt": counts.n_gt,
        "n_matched": counts.n_matched,
        "parse_rate": round(sum(report.ok for report in reports) / len(reports), 4),
        "unusable": sum(not r.usable for r in rollouts),
        "truncated": sum(report.truncated for report in reports),
        "dropped": dict(dropped),
        "tokens_mean": round(float(np.mean(tokens)), 1),
        "tokens_p99": int(np.quantile(tokens, 0.99)),
    }


def warn_of_unusable(reports: Sequence[ParseReport]) -> None:
    """Warn if channel B will have little to train on."""
    images, unusable = len(reports), sum(not report.container_found for report in reports)
    if unusable > MOST_UNUSABLE * images:
        log.warning(
            "%d of %d rollouts do not parse, and channel B uses the ground truth for them. Expected almost none: train "
            "stage 1 longer, or set decode.grammar.",
            unusable,
            images,
        )
    if (truncated := sum(report.truncated for report in reports)) > MOST_UNUSABLE * images:
        log.warning(
            "%d of %d rollouts are truncated at the token budget. Expected almost none: train stage 1 longer, or raise "
            "decode.max_new_tokens.",
            truncated,
            images,
        )
    if not any(report.n_valid for report in reports):
        log.warning("the rollouts have no objects: matching finds nothing, and channel B only appends missed objects.")


def write_generations(path: Path, generations: Mapping[int, Generation]) -> None:
    """Write one JSON line per image: its id, the generated ids and the finish reason."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for image_id, generation in generations.items():
            row = {"image_id": image_id, "ids": generation.ids.tolist(), "finish_reason": generation.finish_reason}
            out.write(json.dumps(row) + "\n")


def read_generations(path: Path, vocabulary_size: int) -> dict[int, Generation]:
    """Generations by image id; raises DataError for a line that `write_generations` did not write."""
    out: dict[int, Generation] = {}
    for where, row in GENERATIONS.json_lines(path):
        try:
            image_id = row["image_id"]
            if type(image_id) is not int or image_id in out:
                raise ValueError(f"the image id is {shown(image_id)}, expected an integer that occurs once")
            out[image_id] = Generation.from_json(row["ids"], row["finish_reason"], vocabulary_size)
        except (ValueError, KeyError, TypeError) as error:
            GENERATIONS.refuse(where, f"not a rollout: {error}", error)
    return out
