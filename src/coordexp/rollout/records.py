"""Rollouts on file, for stage 2: one JSON line per image with ids, objects with token positions, and accepted pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from coordexp.config.schema import MatchingParams
from coordexp.geometry.bins import box_scale, decode_norm
from coordexp.infra.files import replacing
from coordexp.matching.matcher import match_images, name_distance
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import Generation
from coordexp.text.parser import ParsedAnswer


@dataclass(frozen=True, slots=True)
class RolloutObject:
    """A parsed object of a rollout: text, bins, and where its coordinates are among the generated tokens."""

    desc: str
    bins: tuple[int, int, int, int]
    coord_positions: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout after the E-step. `pairs` are accepted (prediction, ground truth) indices; both count from 0.

    `usable` is False if no container was found: stage 2 then falls back to channel A for this sample.
    """

    image_id: int
    ids: tuple[int, ...]
    finish_reason: str
    usable: bool
    objects: tuple[RolloutObject, ...]
    pairs: tuple[tuple[int, int], ...]
    pair_ious: tuple[float, ...]


def match_rollouts(
    samples: Sequence[Sample],
    generations: Sequence[Generation],
    answers: Sequence[ParsedAnswer],
    matching: MatchingParams,
) -> list[Rollout]:
    """The parsed objects of each generation, matched to the (non-crowd) ground truth of its sample."""
    rollouts = [
        Rollout(
            image_id=sample.image_id,
            ids=tuple(generation.ids.tolist()),
            finish_reason=generation.finish_reason,
            usable=answer.report.container_found,
            objects=tuple(RolloutObject(o.desc, o.bins, o.coord_positions) for o in answer.objects),
            pairs=(),
            pair_ious=(),
        )
        for sample, generation, answer in zip(samples, generations, answers, strict=True)
    ]
    return rematch(rollouts, samples, matching)


def rematch(rollouts: Sequence[Rollout], samples: Sequence[Sample], matching: MatchingParams) -> list[Rollout]:
    """The same answers matched anew: what stage 2 does in each step, where gate and costs may follow a curriculum."""
    pred, gt, distances = [], [], []
    for rollout, sample in zip(rollouts, samples, strict=True):
        keep = [i for i, crowd in enumerate(sample.iscrowd) if not crowd]
        pred.append(decode_norm([o.bins for o in rollout.objects]))
        gt.append(sample.boxes_xyxy_px[keep].astype(np.float64) / box_scale(sample.width, sample.height))
        if matching.lambda_sem > 0:
            distances.append(name_distance([o.desc for o in rollout.objects], [sample.descs[i] for i in keep]))
    found = match_images(pred, gt, matching, distances or None)
    return [
        replace(
            rollout,
            pairs=tuple((i, j) for i, j in result.pairs.tolist()),
            pair_ious=tuple(round(v, 4) for v in result.iou_P.tolist()),
        )
        for rollout, result in zip(rollouts, found, strict=True)
    ]


def write_rollouts(path: Path, rollouts: Iterable[Rollout]) -> None:
    """One JSON line per rollout."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for rollout in rollouts:
            out.write(json.dumps(asdict(rollout), ensure_ascii=False) + "\n")


def read_rollouts(path: Path) -> dict[int, Rollout]:
    """Rollouts by image id."""
    out = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            row["objects"] = tuple(
                RolloutObject(o["desc"], tuple(o["bins"]), tuple(o["coord_positions"])) for o in row["objects"]
            )
            row["pairs"] = tuple((i, j) for i, j in row["pairs"])
            rollout = Rollout(**{**row, "ids": tuple(row["ids"]), "pair_ious": tuple(row["pair_ious"])})
            out[rollout.image_id] = rollout
    return out
