"""What `dvc metrics diff` reads: few numbers, under the keys and with the values of metrics.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coordexp.config.paths import CHECKPOINTS
from coordexp.evaluation.headline import headline
from coordexp.evaluation.protocol import STANDARD


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def metrics() -> dict[str, Any]:
    areas = {
        "coco": {"mAP": 0.1, "AP50": 0.2, "AP75": 0.15, "AP90": 0.01},
        "f1": {"full_50": 0.3, "loc_50": 0.4},
        "set": {"dup_pairs_90": 0.5, "dup_pairs_95": 0.25},
        "parse": {"parse_rate": 1.0, "valid_objects": 12},
    }
    tree: dict[str, Any] = {name: {"eval": areas} for name in CHECKPOINTS}
    row = {"delta": 0.01, "lo": -0.02, "hi": 0.04, "p_superior": 0.7}
    tree["comparison"] = {"stage2_vs_control": {"coco.mAP": row}, "stage1_vs_base": {"coco.mAP": row}}
    return tree


def test_it_is_a_small_subset_of_the_metrics_under_the_same_keys() -> None:
    everything = dict(leaves(metrics()))
    chosen = dict(leaves(headline(metrics(), STANDARD)))
    assert chosen.items() <= everything.items()
    assert len(chosen) == 3 * 6 + 3
    assert {path[0] for path in chosen} == {"stage1", "stage1-control", "stage2", "comparison"}
    assert chosen["comparison", "stage2_vs_control", "coco.mAP", "lo"] == -0.02


def test_an_undefined_comparison_leaves_no_row() -> None:
    tree = metrics()
    tree["comparison"]["stage2_vs_control"]["coco.mAP"] = None
    assert "comparison" not in headline(tree, STANDARD)


def test_the_duplicates_are_those_of_the_lowest_threshold() -> None:
    tree = metrics()
    for name in CHECKPOINTS:
        tree[name]["eval"]["set"]["dup_pairs_80"] = 0.75
    chosen = headline(tree, STANDARD.model_copy(update={"duplicate_ious": (0.8, 0.9)}))
    assert chosen["stage2"]["eval"]["set"] == {"dup_pairs_80": 0.75}
