"""Keys of earlier designs, and what to use instead: an old file must fail with its remedy, never be half understood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_BOX_WEIGHTS = "bbox_smoothl1_weight, bbox_ciou_weight, bbox_giou_weight, bbox_l1_weight, bbox_log_wh_weight"

# Dotted key -> remedy. The longest key that fits is reported.
REMOVED = {
    "custom": "There is no `custom` block: use the top level of params.yaml, or the block of the stage.",
    "custom.coord_loss": (
        "Stage 1 no longer decodes expected coordinates, so it has no box loss. Delete the block; "
        f"box losses belong to stage 2: {_BOX_WEIGHTS}."
    ),
    "custom.coord_expectation_metrics": (
        "Stage 1 no longer decodes expected coordinates. Delete the block; "
        "coordinate diagnostics are always logged, as coord_diag/* in train_log.jsonl."
    ),
    "custom.coord_soft_ce_w1": (
        "Use softce_weight, w1_weight, gate_weight (for stage 1 in the block stage1), sigma, truncate and temperature."
    ),
    "rollout_matching": "Use the blocks `decode` and `matching`.",
    "stage2_ab": "Use the block `stage2`; loss weights stand at the top level.",
    "stage2_ab.schedule": "Use stage2.b_ratio.",
    "stage2_ab.channel_b": "Use stage2.passes and stage2.missed.",
    "stage2_ab.coord_ce_weight": "Use coord_ce_weight at the top level.",
}


def removed_keys(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (full dotted key, remedy) for every removed key of a parameter tree, each once."""
    for root in sorted({key.split(".")[0] for key in REMOVED} & tree.keys()):
        children = tree[root] if isinstance(tree[root], dict) else {}
        for key in [f"{root}.{child}" for child in children] or [root]:
            yield key, REMOVED.get(key, REMOVED[root])
