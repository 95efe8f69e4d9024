"""Keys of earlier designs, and their replacements. An old file fails with a remedy and is never partly accepted."""

from __future__ import annotations

from typing import Any

_BOX_WEIGHTS = "bbox_smoothl1_weight, bbox_ciou_weight, bbox_giou_weight, bbox_l1_weight, bbox_log_wh_weight"
_SHARES = (  # first of params.yaml, then of a profile
    *("anneal.sigma_share", "anneal.temperature_share", "stage2.curriculum_share", "source.smallest_share"),
    *("source.largest_share", "source.small_share", "source.crowd_share"),
)

# Dotted key -> remedy. The longest matching key is reported.
REMOVED = {
    "custom": "There is no `custom` block. Use the top level of params.yaml, or the block of the stage.",
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
    "stage2_ab": "Use the block `stage2`; loss weights are at the top level.",
    "stage2_ab.schedule": "Use stage2.b_ratio.",
    "stage2_ab.channel_b": "Use stage2.passes and stage2.missed.",
    "stage2_ab.coord_ce_weight": "Use coord_ce_weight at the top level.",
    "stage2.close_weight": (
        "Use stage2.eos_weight: it weighs the stop token, which closes the list under json and is the end of turn "
        "under tags."
    ),
    "eval.batch_images": "Use rollout.batch_images, which also applies to evaluation, as rollout.engine does.",
    **dict.fromkeys(
        ("source.held_out_fraction", "source.held_out_share"),
        "Use the block source.held_out: strict, phrase, plain_only, and never.",
    ),
    **{key: f"Use {key.removesuffix('share')}fraction, which has the same meaning." for key in _SHARES},
}


def removed_keys(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[tuple[int | str, ...], str]]:
    """A parameter tree without its removed keys, and the remedy of each removed key by its location in the tree."""
    remedies: dict[tuple[int | str, ...], str] = {}
    return _kept(tree, (), "", remedies), remedies


def _kept(
    tree: dict[str, Any], at: tuple[int | str, ...], remedy: str, remedies: dict[tuple[int | str, ...], str]
) -> dict[str, Any]:
    """`remedy` is the remedy of the block if the whole block was removed."""
    kept = {}
    for name, value in tree.items():
        location = (*at, name)
        key = ".".join(map(str, location))
        known = REMOVED.get(key, remedy)
        if isinstance(value, dict) and value and any(other.startswith(f"{key}.") for other in REMOVED):
            inner = _kept(value, location, known, remedies)
            if not known:
                kept[name] = inner
        elif known:
            remedies[location] = known
        else:
            kept[name] = value
    return kept
