"""Differences between training recipes over several seeds, paired by image and by seed, and what they say of claims.

Legend: B resamples, I images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.config.ablation import CLAIMS, DUPLICATES, MAIN_METRIC, Arm, Claim
from coordexp.config.schema import Params
from coordexp.evaluation.bootstrap import resample_weights
from coordexp.evaluation.effect import Effect, Verdict, effect, verdict_of_interval
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.table import Floats
from coordexp.infra.provenance import file_hash, fingerprint, write_json
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import read_results

METRICS = (MAIN_METRIC, "coco.AP75", "f1.full_50", DUPLICATES)
BIN_MAE = "expected_bin_mae"


@dataclass(frozen=True, slots=True, eq=False)
class SeedResult:
    """One arm under one seed: METRICS on the evaluated split, their resamples (B,), and the bin error."""

    values: dict[str, float]
    samples: dict[str, Floats]
    bin_mae: float | None


def seed_result(folder: Path, split: str, categories: Sequence[Category], params: Params) -> SeedResult:
    """The result of a finished arm on a split; evaluated once, then read from `<split>.statistics.json`."""
    predictions, cache = folder / f"{split}.jsonl", folder / f"{split}.statistics.json"
    key = fingerprint({"params": repr((params.eval, params.matching, params.seed)), "metrics": METRICS}, [predictions])
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    found = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
    if found.get("key") != key:
        found = {"key": key, "predictions": file_hash(predictions), **_statistics(predictions, categories, params)}
        write_json(cache, found)
    samples = {name: np.array(values, np.float64) for name, values in found["samples"].items()}
    return SeedResult(found["values"], samples, done["diagnostics"].get(BIN_MAE))


def _statistics(predictions: Path, categories: Sequence[Category], params: Params) -> dict[str, Any]:
    evaluation = evaluate(list(read_results(predictions)), categories, params.eval, params.matching, params.seed)
    rows_I = np.array([row[DUPLICATES.split(".")[1]] for row in evaluation.per_image], np.float64)
    weights_BI = resample_weights(len(rows_I), params.eval.bootstrap_resamples, params.seed)
    samples = evaluation.samples | {DUPLICATES: weights_BI @ rows_I / len(rows_I)}
    values = {name: evaluation.value(name) or 0.0 for name in METRICS}
    return {"values": values, "samples": {name: np.nan_to_num(samples[name]).tolist() for name in METRICS}}


def arm_effect(ours: Sequence[SeedResult], theirs: Sequence[SeedResult], metric: str) -> Effect:
    """The effect ours - theirs on one of METRICS; both list their results seed by seed in the same order."""
    pairs = list(zip(ours, theirs, strict=True))
    deltas_S = np.array([a.values[metric] - b.values[metric] for a, b in pairs])
    found = effect(deltas_S, np.stack([a.samples[metric] - b.samples[metric] for a, b in pairs]))
    assert found is not None, "resamples without a value are counted as 0"
    return found


def judged(claim: Claim, found: Effect) -> str:
    """Whether an effect agrees with a claim."""
    sides = {Verdict.BETTER: "higher", Verdict.WORSE: "lower"}
    side = sides.get(verdict_of_interval(found.lo, found.hi), "same")
    if side == claim.expected:
        return "agrees (no difference shown)" if side == "same" else "agrees"
    return "not shown" if side == "same" else "disagrees"


def ablation_summary(arms: Sequence[Arm], results: Mapping[str, Mapping[str, Sequence[SeedResult]]]) -> dict[str, Any]:
    """What the report shows: per arm the means over seeds and differences, the choice on dev, and the claims on val.

    Args:
        arms: the arms that were run, in order.
        results: split -> arm name -> its results, seed by seed.
    """
    on_val = results["val"]
    rows = []
    for arm in arms:
        base = on_val[arm.baseline]
        compared = arm.name != arm.baseline
        effects = {m: arm_effect(on_val[arm.name], base, m) for m in METRICS} if compared else {}
        rows.append(
            {
                "name": arm.name,
                "stage": arm.stage,
                "baseline": arm.baseline,
                "changes": dict(arm.changes) | ({"model.coord_init": arm.coord_init} if arm.coord_init else {}),
                "val": _means(on_val[arm.name]),
                "dev": _means(results["dev"][arm.name]),
                "difference": {m: asdict(found) for m, found in effects.items()},
                "verdict": effects[MAIN_METRIC].verdict.value if compared else "baseline",
            }
        )
    claims = []
    for claim in CLAIMS:
        if claim.arm in on_val and claim.baseline in on_val:
            found = arm_effect(on_val[claim.arm], on_val[claim.baseline], claim.metric)
            named = {name: getattr(claim, name) for name in ("text", "source", "arm", "baseline", "metric", "expected")}
            claims.append(named | {"difference": asdict(found), "judgement": judged(claim, found)})
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
