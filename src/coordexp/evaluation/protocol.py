"""The evaluation protocol: COCO's constants, and the parameters for evaluating files from outside a run."""

from __future__ import annotations

import numpy as np

from coordexp.config.schema import EvalParams, MatchingParams

# Constructed as in pycocotools: with np.arange, some thresholds would be slightly above their nominal value.
COCO_IOUS = np.linspace(0.5, 0.95, 10)
RECALL_GRID = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100  # per image and category, highest score first
AREA_EDGES_PX2 = (32.0**2, 96.0**2)  # separate small from medium and medium from large objects

# Predictions of other detectors come without a params.yaml. A test keeps these values equal to the repository's.
STANDARD = EvalParams(
    bootstrap_resamples=1000,
    f1_ious=(0.3, 0.5, 0.75, 0.95),
    duplicate_ious=(0.9, 0.95),
    mapping="normalised",
    semantic_floor=0.5,
    semantic_margin=0.05,
)
# `semantic` alone differs from params.yaml (encoder), on purpose: with lambda_sem 0 it changes no pair, and the lexical
# similarity needs no checkpoint, which foreign predictions come without.
STANDARD_MATCHING = MatchingParams(
    lambda_l1=1.0, lambda_iou=1.0, lambda_sem=0.0, semantic="lexical", gate="iou", gate_threshold=0.3
)
STANDARD_SEED = 17


def f1_thresholds(params: EvalParams) -> tuple[float, ...]:
    """The F1 thresholds, always including .50 and .95: papers report F1 at .50, at .95, and the mean."""
    return tuple(sorted({*params.f1_ious, 0.5, 0.95}))


def iou_key(iou: float) -> str:
    """A threshold as it appears in a metric name: 0.5 is "50", 0.95 is "95"."""
    return f"{round(100 * iou):02d}"
