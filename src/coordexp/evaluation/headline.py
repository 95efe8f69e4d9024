"""The few numbers that `dvc metrics diff` shows: a subset of metrics.json under the same keys.

metrics.json has several hundred values; a table of all that moved a little hides the ones that decide. The base model
is left out, no experiment trains it.
"""

from __future__ import annotations

from typing import Any

from coordexp.config.schema import EvalParams
from coordexp.evaluation.protocol import iou_key

SUBJECTS = ("stage1", "stage1-control", "stage2")
DECIDING = ("stage2_vs_control", "coco.mAP")  # does stage 2 beat the same compute spent on stage 1?


def headline_keys(params: EvalParams) -> tuple[str, ...]:
    """The metrics shown of each checkpoint, as "area.metric"."""
    duplicates = f"set.dup_pairs_{iou_key(min(params.duplicate_ious))}"
    return ("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", duplicates, "parse.parse_rate")


def headline(metrics: dict[str, Any], params: EvalParams) -> dict[str, Any]:
    """The part of metrics.json that `dvc metrics` reads: at most 21 values."""
    chosen: dict[str, Any] = {}
    for checkpoint in SUBJECTS:
        areas: dict[str, Any] = {}
        for key in headline_keys(params):
            area, name = key.split(".", 1)
            areas.setdefault(area, {})[name] = metrics[checkpoint]["eval"][area][name]
        chosen[checkpoint] = {"eval": areas}
    pair, key = DECIDING
    difference = metrics["comparison"][pair][key]
    if difference is not None:
        shown = {name: difference[name] for name in ("delta", "lo", "hi")}
        chosen["comparison"] = {pair: {key: shown}}
    return chosen
