"""Strict parsing and matching of rollouts, compared with Python code that loops over objects and rasterizes masks.

    PYTHONPATH=src python -m benchmarks.parse_and_match

Rollouts of images with COCO's number of objects, written in Qwen's tokens: each object found with a small error or
missed, some invented. The reference decodes text, reads JSON, draws every box on a canvas of 256 x 256 and takes the
IoU of masks, pair by pair; both then solve the same assignment. One core.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.coco_like import names, scenes
from benchmarks.harness import Row, measured, side_by_side
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from tests.qwen import qwen3_tokenizer
from transformers import PreTrainedTokenizerBase

from benchmarks import harness
from coordexp.evaluation.protocol import STANDARD_MATCHING
from coordexp.geometry.bins import COORD_TOKENS, decode_norm
from coordexp.matching.matcher import match_images
from coordexp.text.codecs import CODECS, AnswerEncoder, TextObject
from coordexp.text.parser import parse_answer
from coordexp.text.symbols import TokenTable
from coordexp.text.vocabulary import CoordVocabulary

ROUNDS = 5
CANVAS = 256
SPEED, THROUGHPUT = 20.0, 50_000
_COORD = re.compile(r"<\|coord_(\d+)\|>")


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One answer and what it should have found; boxes in [0, 1]."""

    token_ids: NDArray[np.int32]
    gt_boxes_M4: NDArray[np.float64]


def rollouts(encoder: AnswerEncoder, n_images: int) -> list[Rollout]:
    """Answers that find 85 % of the objects within some bins, and invent one in ten."""
    made, rng, labels = scenes(n_images), np.random.default_rng(5), names()
    out, start = [], 0
    for (w, h), count in zip(made.sizes_wh_I2.tolist(), made.counts_I.tolist(), strict=True):
        gt = made.boxes_G4[start : start + count] / (w, h, w, h)
        called = made.names_G[start : start + count]
        start += count
        is_found = rng.random(count) < 0.85
        invented = rng.random((rng.binomial(count, 0.1), 4))
        boxes = np.concatenate([gt[is_found] + rng.normal(0, 0.01, (is_found.sum(), 4)), invented])
        bins = np.clip(np.rint(boxes * 1000), 0, 999).astype(int)
        bins = np.concatenate([np.minimum(bins[:, :2], bins[:, 2:]), np.maximum(bins[:, :2], bins[:, 2:])], axis=1)
        words = [labels[i] for i in [*called[is_found], *rng.integers(0, 80, len(invented))]]
        objects = [TextObject(desc, tuple(row)) for desc, row in zip(words, bins.tolist(), strict=True)]
        out.append(Rollout(encoder.encode(objects).ids, gt))
    return out


def ours(these: Sequence[Rollout], table: TokenTable, codec: str) -> int:
    """Parse and match; returns the number of parsed objects."""
    answers = [parse_answer(rollout.token_ids, table, codec).objects for rollout in these]
    boxes = [decode_norm([o.bins for o in objects]) for objects in answers]
    match_images(boxes, [rollout.gt_boxes_M4 for rollout in these], STANDARD_MATCHING)
    return sum(len(objects) for objects in answers)


def reference(these: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> int:
    """The same one object at a time, for the `json` codec."""
    n_objects = 0
    for rollout in these:
        text = tokenizer.decode(rollout.token_ids).removesuffix("<|im_end|>")
        objects = json.loads(text)["objects"]
        boxes = [[int(_COORD.fullmatch(token)[1]) / 1000 for token in obj["bbox_2d"]] for obj in objects]
        boxes = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
        cost = np.zeros((len(boxes), len(rollout.gt_boxes_M4)))
        gt_masks = [raster(box) for box in rollout.gt_boxes_M4]
        for i, box in enumerate(boxes):
            mask = raster(box)
            for j, gt_mask in enumerate(gt_masks):
                union = np.logical_or(mask, gt_mask).sum()
                iou = np.logical_and(mask, gt_mask).sum() / union if union else 0.0
                cost[i, j] = 1.0 - iou if iou >= 0.3 else 2.0
        linear_sum_assignment(cost)
        n_objects += len(boxes)
    return n_objects


def raster(box: Sequence[float]) -> NDArray[np.bool_]:
    """A box in [0, 1] as a mask."""
    x1, y1, x2, y2 = (round(v * CANVAS) for v in box)
    mask = np.zeros((CANVAS, CANVAS), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Objects per second of both, and of each codec."""
    tokenizer = qwen3_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(COORD_TOKENS)})
    table = TokenTable.from_tokenizer(tokenizer, CoordVocabulary.from_tokenizer(tokenizer))
    n_images, n_theirs = (40, 4) if arguments.quick else (3000, 60)
    rows = []
    for codec in ("json", "tags"):
        these = rollouts(AnswerEncoder(tokenizer, CODECS[codec]), n_images)
        contestants = {"ours": lambda t=these, c=codec: ours(t, table, c)}
        if codec == "json":
            few = these[:n_theirs]
            contestants["theirs"] = lambda f=few: reference(f, tokenizer)
            assert ours(few, table, codec) == reference(few, tokenizer)
        times = side_by_side(contestants, 2 if arguments.quick else ROUNDS)
        n_objects = ours(these, table, codec)
        speed = times.of("ours").map(lambda seconds, n=n_objects: n / seconds)
        beside = f"{n_objects:,} objects of {n_images:,} answers, one core"
        rows.append(measured(f"parse and match, {codec}: objects", speed, "a second", beside, at_least=THROUGHPUT))
        if codec == "json":
            more = n_objects / ours(few, table, codec)
            ratio = times.ratio("theirs", "ours").map(lambda r, more=more: r * more)
            beside = f"per object: text, masks of {CANVAS} x {CANVAS}; {n_theirs} of the answers"
            rows.append(measured("parse and match, json: times faster", ratio, "x", beside, at_least=SPEED))
    return rows


if __name__ == "__main__":
    harness.script("parse_and_match", __doc__, measure)
