"""Stage 1 and the control that continues it, as runs: which data, which steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import OptimConfig, Profile
from coordexp.config.schema import Params
from coordexp.models.loading import Checkpoint, load_checkpoint
from coordexp.packing.plan_file import read_packs
from coordexp.packing.samples import SampleStore
from coordexp.training.builders import (
    ROW_LR_FACTOR,
    make_collator,
    make_encoder,
    stage1_objective,
)
from coordexp.training.sample_source import SampleSource
from coordexp.training.schedule import packs_for_budget, step_items
from coordexp.training.session import Session, run_session, start_files
from coordexp.training.teacher_task import TeacherTask

SHARED_KEYS = ("seed", "target", "sigma", "truncate", "temperature")


def _load(profile: Profile, folder: Path) -> Checkpoint:
    return load_checkpoint(folder, profile.model.min_pixels, profile.model.max_pixels)


def train_stage1(params: Params, profile: Profile, paths: ProfilePaths) -> dict[str, Any]:
    """Teacher forcing from the initial checkpoint on the planned packs."""
    init = paths.norm1000 / "init"
    checkpoint = _load(profile, init)
    packs = read_packs(paths.packed / "plan.parquet")
    optim = profile.stage1
    packs_by_step = [
        [packs[i] for i in items] for items in step_items(len(packs), optim.packs_per_step, optim.steps, params.seed)
    ]
    return _teach(params, profile, paths, "stage1", checkpoint, init, packs_by_step, optim)


def train_control(params: Params, profile: Profile, paths: ProfilePaths) -> dict[str, Any]:
    """Stage 1 continued with stage 2's optimizer, schedule and number of steps, and as many tokens as that ran."""
    start = paths.run("stage1")
    checkpoint = _load(profile, start)
    packs = read_packs(paths.packed / "plan.parquet")
    lengths = SampleStore(paths.norm1000 / "train.parquet").lengths()
    budget = read_compute(paths)["tokens"]
    pack_tokens = [int(lengths[pack].sum()) for pack in packs]
    chosen = packs_for_budget(pack_tokens, budget, profile.stage2.steps, params.seed + 2)
    packs_by_step = [[packs[i] for i in items] for items in chosen]
    return _teach(params, profile, paths, "stage1-control", checkpoint, start, packs_by_step, profile.stage2)


def _teach(
    params: Params,
    profile: Profile,
    paths: ProfilePaths,
    stage: str,
    checkpoint: Checkpoint,
    start: Path,
    packs_by_step: Sequence[Sequence[Sequence[int]]],
    optim: OptimConfig,
) -> dict[str, Any]:
    data = paths.norm1000 / "train.parquet"
    collator = make_collator(checkpoint, paths.raw, profile.packing.pack_tokens)
    source = SampleSource(SampleStore(data), make_encoder(params, checkpoint), params.text.object_order, params.seed)
    task = TeacherTask(checkpoint.model, stage1_objective(params, checkpoint), source, collator, packs_by_step)
    settings = params.model_dump(include={*SHARED_KEYS, "text", "stage1"}) | {
        "optim": optim.model_dump(),
        "stage": stage,
    }
    session = Session(
        stage=stage,
        settings=settings | {"packs_by_step": sum(len(p) for p in packs_by_step)},
        inputs={**start_files(start), "samples": data, "plan": paths.packed / "plan.parquet"},
        optim=optim,
        tuning=profile.tuning,
        steps=len(packs_by_step),
        threads=profile.launch.threads,
        seed=params.seed,
        row_lr_factor=ROW_LR_FACTOR,
        out=paths.run(stage),
    )
    return run_session(session, checkpoint, task)


def read_compute(paths: ProfilePaths) -> dict[str, int]:
    """Steps and forward tokens of stage 2: what the control is given."""
    return json.loads(paths.run("stage2-compute.json").read_text(encoding="utf-8"))
