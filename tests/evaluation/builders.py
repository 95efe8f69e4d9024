"""Small data sets for the evaluation tests: written by hand, or drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coordexp.evaluation.evaluator import Evaluation, evaluate
from coordexp.evaluation.lvis import FederatedLabels
from coordexp.evaluation.protocol import STANDARD, STANDARD_MATCHING, STANDARD_SEED
from coordexp.evaluation.table import DetectionTable, build_table
from coordexp.geometry.boxes import Box
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction

CAT, DOG, OWL = Category(1, "cat"), Category(2, "dog"), Category(3, "barn owl", "held_out")
ANIMALS = (CAT, DOG, OWL)
FAST = STANDARD.model_copy(update={"bootstrap_resamples": 20})  # fewer than a run may ask for


def box(column: int, row: int, side: float = 40.0) -> Box:
    """A square on a grid whose cells never touch."""
    return (60.0 * column + 10, 60.0 * row + 10, 60.0 * column + 10 + side, 60.0 * row + 10 + side)


def shifted(at: Box, dx: float, dy: float) -> Box:
    return (at[0] + dx, at[1] + dy, at[2] + dx, at[3] + dy)


def pred(desc: str, at: Box, score: float | None = 0.9) -> Prediction:
    return Prediction(desc, at, (0, 0, 0, 0), score=score)


def image(
    image_id: int,
    gt: Sequence[tuple[str, Box] | GroundTruth],
    preds: Sequence[Prediction],
    parse: ParseReport | None = None,
    size: tuple[int, int] = (400, 400),
) -> ImageResult:
    return ImageResult(
        image_id=image_id,
        image=f"{image_id:03d}.jpg",
        width=size[0],
        height=size[1],
        gt=tuple(g if isinstance(g, GroundTruth) else GroundTruth(*g) for g in gt),
        pred=tuple(preds),
        raw_text="",
        parse=parse or ParseReport(container_found=True, n_valid=len(preds)),
        finish_reason="stop",
        n_generated_tokens=1,
    )


def perfect_zoo(n_images: int = 4) -> list[ImageResult]:
    """Every image holds one animal of each kind, and each is predicted exactly."""
    animals = [(c.name, box(column, 0)) for column, c in enumerate(ANIMALS)]
    return [image(i, animals, [pred(name, at) for name, at in animals]) for i in range(1, n_images + 1)]


def with_predictions(results: list[ImageResult], change) -> list[ImageResult]:
    """The same images with `change(prediction) -> list of predictions` applied to each prediction."""
    return [replace(r, pred=tuple(new for old in r.pred for new in change(old))) for r in results]


def run(
    results: Sequence[ImageResult],
    categories: Sequence[Category] = ANIMALS,
    federated: FederatedLabels | None = None,
    seed: int = STANDARD_SEED,
    **changes: Any,
) -> Evaluation:
    """An evaluation with few resamples and, with `changes`, other values of the block `eval`."""
    params = FAST.model_copy(update=changes)
    return evaluate(results, categories, params, STANDARD_MATCHING, seed, federated)


def table_of(results: Sequence[ImageResult], categories: Sequence[Category] = ANIMALS) -> DetectionTable:
    return build_table(results, categories, FAST)


def random_results(
    seed: int,
    n_images: int = 30,
    n_categories: int = 6,
    max_gt: int = 8,
    max_pred: int = 14,
    score_levels: int | None = None,
    crowd_rate: float = 0.0,
) -> tuple[list[ImageResult], list[Category]]:
    """Images with jittered, renamed, repeated and invented predictions; the last category is never annotated.

    `score_levels` rounds scores to that many values, which makes ties. Boxes of 8 to 200 px fill all area bands.
    """
    rng = np.random.default_rng(seed)
    categories = [Category(3 * k + 1, f"kind {k}", "held_out" if k == 1 else "train") for k in range(n_categories)]

    def draw_box() -> np.ndarray:
        side = np.exp(rng.uniform(np.log(8), np.log(200), 2))
        corner = rng.uniform(0, 400 - side)
        return np.concatenate([corner, corner + side])

    def draw_pred(objects: list[GroundTruth]) -> Prediction:
        score = float(rng.random() if score_levels is None else rng.integers(score_levels) / score_levels)
        if not objects or rng.random() < 0.3:
            name = "no such kind" if rng.random() < 0.2 else categories[rng.integers(n_categories)].name
            return pred(name, tuple(draw_box().tolist()), score)
        target = objects[rng.integers(len(objects))]
        at = np.array(target.bbox_xyxy_px) + rng.normal(0, 2.5, 4) * (rng.random() < 0.9)
        at = np.concatenate([np.minimum(at[:2], at[2:]), np.maximum(at[:2], at[2:])])
        name = target.desc if rng.random() < 0.8 else categories[rng.integers(n_categories)].name
        return pred(name, tuple(at.tolist()), score)

    results = []
    for i in range(n_images):
        objects = [
            GroundTruth(
                categories[rng.integers(n_categories - 1)].name,
                tuple(draw_box().tolist()),
                bool(rng.random() < crowd_rate),
            )
            for _ in range(rng.integers(max_gt + 1))
        ]
        results.append(image(10 * i + 7, objects, [draw_pred(objects) for _ in range(rng.integers(max_pred + 1))]))
    return results, categories
