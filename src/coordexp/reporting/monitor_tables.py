"""The eval table: finished checkpoints on val, and every look at the model in training on its few dev images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from coordexp.config.paths import CHECKPOINTS
from coordexp.config.schema import EvalParams
from coordexp.evaluation.protocol import iou_key
from coordexp.reporting.inputs import TRAINED, Json, Metrics, metric
from coordexp.reporting.markdown import number, percent, table

Looks = Mapping[str, Sequence[Json] | None]  # by training stage; None if the run left no monitor.jsonl
BUDGET = 0.05  # of the training time
_COUNTS = ("predictions", "right", "false", "missed")


def checkpoint_counts_table(metrics: Metrics, settings: EvalParams) -> str:
    """Scores and the counts they rest on, one row a checkpoint."""
    pairs = f"set.dup_pairs_{iou_key(min(settings.duplicate_ious))}"
    keys: tuple[str, ...] = ("coco.mAP", "f1.full_50", "f1.precision_50", "f1.recall_50")
    keys += ("coco.n_pred", "f1.tp_50", "f1.fp_50", "f1.fn_50", pairs, "parse.parse_rate", "parse.truncated_rate")
    header = ["checkpoint", "mAP", "F1", "precision", "recall", *_COUNTS, "duplicate pairs an image", "parse rate"]
    header += ["cut, share"]
    return table(header, [[name, *(number(metric(metrics, name, key)) for key in keys)] for name in CHECKPOINTS])


def looks_table(looks: Looks) -> str:
    """One row a look, in the order of training; empty if there was none."""
    keys = ("f1", "precision", "recall", *_COUNTS, "dup_pairs_90", "parse_rate", "truncated")
    rows = [
        [name, str(row["step"]), *(number(row[key]) for key in keys), f"{row['seconds']:.1f}"]
        for name in TRAINED
        for row in looks[name] or ()
    ]
    header = ["stage", "step", "F1", "precision", "recall", *_COUNTS, "duplicate pairs", "parse rate", "cut", "seconds"]
    return table(header, rows) if rows else ""


def looks_sentence(looks: Looks, metadata: Mapping[str, Json]) -> str:
    """What was looked at, how far one look can be trusted, and what looking cost; or why there is nothing."""
    rows = [row for name in TRAINED for row in looks[name] or ()]
    if not rows:
        if any(looks[name] is None for name in TRAINED):
            return "No look at a training step: these runs left no `monitor.jsonl`; `dvc repro` writes one."
        return "No look at a training step: `monitor.every_steps` of the profile is 0."
    n_objects = max(row["objects"] for row in rows)
    half_width = 1.96 * math.sqrt(0.25 / max(1, n_objects))
    shares = {name: share for name in TRAINED if (share := time_share(metadata[name])) is not None}
    cost = ", ".join(f"{name} {percent(share)}" for name, share in shares.items())
    return (
        f"While training: the same {rows[0]['images']} dev images with {n_objects} objects at every look, greedy, "
        "paired as in training at IoU .50. So few objects place a recall near one half within "
        f"±{half_width:.2f} only (95 %): read the direction and the counts, not the digits. "
        "mAP over so few images says nothing and is left out. "
        f"Share of the training time: {cost}."
    )


def time_share(metadata: Json) -> float | None:
    """Seconds of looking, as a share of those and the seconds in steps; None if nothing was looked at."""
    looking = float(metadata.get("monitor_seconds") or 0.0)
    return looking / (looking + float(metadata["step_seconds"])) if looking else None
