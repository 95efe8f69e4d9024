"""The packing plan on disk: one row per sample (pack, position in pack, sample index), and its statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coordexp.infra.files import replacing
from coordexp.packing.planner import PackPlan


def write_plan(path: Path, plan: PackPlan) -> None:
    """Write the plan as parquet."""
    packs = np.repeat(np.arange(len(plan.packs)), [len(p) for p in plan.packs])
    samples = np.concatenate([np.asarray(p) for p in plan.packs])
    with replacing(path) as temporary:
        pq.write_table(pa.table({"pack": packs.astype(np.int32), "sample": samples.astype(np.int32)}), temporary)


def read_packs(path: Path) -> list[list[int]]:
    """Sample indices of every pack, in plan order."""
    table = pq.read_table(path)
    packs, samples = table.column("pack").to_numpy(), table.column("sample").to_numpy()
    return [part.tolist() for part in np.split(samples, np.flatnonzero(np.diff(packs)) + 1)]


def plan_stats(plan: PackPlan) -> dict[str, Any]:
    """Fill and sizes of a plan."""
    per_pack = [len(p) for p in plan.packs]
    return {
        "pack_tokens": plan.pack_tokens,
        "packs": len(plan.packs),
        "samples": sum(per_pack),
        "tokens": plan.used_tokens,
        "fill": round(plan.fill, 5),
        "samples_per_pack_mean": round(float(np.mean(per_pack)), 3),
        "samples_per_pack_max": max(per_pack),
    }
