"""Differences between training recipes over several seeds: a bootstrap over images and seeds at once.

A resample draws images, the same for every arm and seed, and seeds, the same for both sides of a pair: what is left in
the interval is how much the difference would move with other images and other seeds.

Legend: B resamples, S seeds, I images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.config.ablation import CLAIMS, DUPLICATES, MAIN_METRIC, Arm, Claim
from coordexp.config.provenance import file_hash, fingerprint, write_json
from coordexp.evaluation.bootstrap import difference, resample_weights
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.settings import EvalSettings
from coordexp.evaluation.table import Floats
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import read_results

METRICS = (MAIN_METRIC, "coco.AP75", "f1.full_50", DUPLICATES)
LOWER_IS_BETTER = frozenset({DUPLICATES})
BIN_MAE = "expected_bin_mae"


@dataclass(frozen=True, slots=True, eq=False)
class SeedResult:
    """One arm under one seed: METRICS on the evaluated split, their resamples (B,), and the bin error."""

    values: dict[str, float]
    samples: dict[str, Floats]
    bin_mae: float | None


def seed_result(folder: Path, split: str, categories: Sequence[Category], settings: EvalSettings) -> SeedResult:
    """The result of a finished arm on a split; evaluated once, then read from `<split>.statistics.json`."""
    predictions, cache = folder / f"{split}.jsonl", folder / f"{split}.statistics.json"
    key = fingerprint({"settings": repr(settings), "metrics": METRICS}, [predictions])
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    found = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
    if found.get("key") != key:
        found = {"key": key, "predictions": file_hash(predictions), **_statistics(predictions, categories, settings)}
        write_json(cache, found)
    samples = {name: np.array(values, np.float64) for name, values in found["samples"].items()}
    return SeedResult(found["values"], samples, done["diagnostics"].get(BIN_MAE))


def _statistics(predictions: Path, categories: Sequence[Category], settings: EvalSettings) -> dict[str, Any]:
    evaluation = evaluate(list(read_results(predictions)), categories, settings)
    rows_I = np.array([row[DUPLICATES.split(".")[1]] for row in evaluation.per_image], np.float64)
    samples = evaluation.samples | {DUPLICATES: resample_weights(len(rows_I), settings) @ rows_I / len(rows_I)}
    values = {name: evaluation.value(name) or 0.0 for name in METRICS}
    return {"values": values, "samples": {name: np.nan_to_num(samples[name]).tolist() for name in METRICS}}


def arm_difference(
    ours: Sequence[SeedResult], theirs: Sequence[SeedResult], metric: str, seed: int
) -> dict[str, float]:
    """Mean difference ours - theirs over paired seeds: `delta`, its 95 % interval `lo`, `hi`, and `p_superior`.

    Args:
        ours, theirs: results of two arms, seed by seed in the same order.
        metric: one of METRICS.
        seed: of the draws of seeds.
    """
    a_SB, b_SB = (np.stack([result.samples[metric] for result in side]) for side in (ours, theirs))
    n_seeds, n_resamples = a_SB.shape
    drawn_SB = np.random.default_rng(seed).integers(0, n_seeds, (n_seeds, n_resamples))
    a_B, b_B = (np.take_along_axis(side, drawn_SB, axis=0).mean(axis=0) for side in (a_SB, b_SB))
    delta = float(np.mean([a.values[metric] - b.values[metric] for a, b in zip(ours, theirs, strict=True)]))
    found = difference(a_B, b_B, delta)
    assert found is not None, "resamples without a value are counted as 0"
    return found


def verdict(metric: str, found: Mapping[str, float]) -> str:
    """The rule, fixed before any run: an interval that excludes 0 decides, nothing else does."""
    if found["lo"] <= 0 <= found["hi"]:
        return "no difference shown"
    return "better" if (found["delta"] > 0) != (metric in LOWER_IS_BETTER) else "worse"


def judged(claim: Claim, found: Mapping[str, float]) -> str:
    """Whether a difference agrees with a claim, under the same rule."""
    side = "same" if found["lo"] <= 0 <= found["hi"] else "higher" if found["delta"] > 0 else "lower"
    if side == claim.expected:
        return "agrees (no difference shown)" if side == "same" else "agrees"
    return "not shown" if side == "same" else "disagrees"


def ablation_summary(
    arms: Sequence[Arm], results: Mapping[str, Mapping[str, Sequence[SeedResult]]], seed: int
) -> dict[str, Any]:
    """What the report shows: per arm the means over seeds and differences, the choice on dev, and the claims on val.

    Args:
        arms: the arms that were run, in order.
        results: split -> arm name -> its results, seed by seed.
        seed: of the draws of seeds.
    """
    on_val = results["val"]
    rows = []
    for arm in arms:
        base = on_val[arm.baseline]
        differences = {m: arm_difference(on_val[arm.name], base, m, seed) for m in METRICS} if base else {}
        rows.append(
            {
                "name": arm.name,
                "stage": arm.stage,
                "baseline": arm.baseline,
                "changes": dict(arm.changes),
                "val": _means(on_val[arm.name]),
                "dev": _means(results["dev"][arm.name]),
                "difference": differences if arm.name != arm.baseline else {},
                "verdict": verdict(MAIN_METRIC, differences[MAIN_METRIC]) if arm.name != arm.baseline else "baseline",
            }
        )
    claims = []
    for claim in CLAIMS:
        if claim.arm in on_val and claim.baseline in on_val:
            found = arm_difference(on_val[claim.arm], on_val[claim.baseline], claim.metric, seed)
            named = {name: getattr(claim, name) for name in ("text", "source", "arm", "baseline", "metric", "expected")}
            claims.append(named | {"difference": found, "judgement": judged(claim, found)})
    return {"arms": rows, "claims": claims, "chosen_on_dev": _chosen(rows)}


def _means(results: Sequence[SeedResult]) -> dict[str, float | None]:
    means: dict[str, float | None] = {m: float(np.mean([r.values[m] for r in results])) for m in METRICS}
    errors = [r.bin_mae for r in results if r.bin_mae is not None]
    return means | {"bin_mae": float(np.mean(errors)) if errors else None}


def _chosen(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The arm of each stage with the highest mean on dev: what tuning would pick, before val is looked at."""
    chosen: dict[str, str] = {}
    for stage in ("stage1", "stage2"):
        mine = [row for row in rows if row["stage"] == stage]
        if mine:
            chosen[stage] = max(mine, key=lambda row: row["dev"][MAIN_METRIC])["name"]
    return chosen
