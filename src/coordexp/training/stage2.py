"""Stage 2 as a run: which data, which objective, which steps."""

from __future__ import annotations

from typing import Any

from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.provenance import write_json
from coordexp.config.schema import Params
from coordexp.models.loading import load_checkpoint
from coordexp.packing.samples import SampleStore
from coordexp.rollout.records import read_rollouts
from coordexp.training.builders import ROW_LR_FACTOR, make_collator, make_encoder, soft_context, stage2_objective
from coordexp.training.channel_b import ChannelBSettings
from coordexp.training.sample_source import SampleSource
from coordexp.training.session import Session, run_session, start_files
from coordexp.training.stage2_task import Stage2Task, plan_steps


def train_stage2(params: Params, profile: Profile, paths: ProfilePaths) -> dict[str, Any]:
    """Channels A and B from the stage-1 checkpoint and the rollouts on file; also writes what compute it took."""
    start, data = paths.run("stage1"), paths.norm1000 / "train.parquet"
    rollout_file = paths.run("rollout") / "rollouts.jsonl"
    checkpoint = load_checkpoint(start, profile.model.min_pixels, profile.model.max_pixels)
    store, rollouts, optim = SampleStore(data), read_rollouts(rollout_file), profile.stage2
    rolled_out = [i for i in range(len(store)) if store[i].image_id in rollouts]
    plan = plan_steps(
        len(store), rolled_out, optim.samples_per_step, optim.steps, params.stage2.b_ratio, params.seed + 1
    )
    encoder = make_encoder(params, checkpoint)
    task = Stage2Task(
        checkpoint.model,
        stage2_objective(params, checkpoint),
        soft_context(params, checkpoint),
        SampleSource(store, encoder, params.text.object_order, params.seed),
        rollouts,
        encoder,
        ChannelBSettings(passes=params.stage2.passes, missed=params.stage2.missed, eos_weight=params.stage2.eos_weight),
        make_collator(checkpoint, paths.raw, profile.packing.pack_tokens),
        plan,
    )
    settings = params.model_dump(exclude={"profile", "stage1", "decode", "eval"}) | {"optim": optim.model_dump()}
    session = Session(
        stage="stage2",
        settings=settings,
        inputs={**start_files(start), "samples": data, "rollouts": rollout_file},
        optim=optim,
        tuning=profile.tuning,
        steps=optim.steps,
        threads=profile.launch.threads,
        seed=params.seed,
        row_lr_factor=ROW_LR_FACTOR,
        out=paths.run("stage2"),
    )
    summary = run_session(session, checkpoint, task)
    write_json(paths.run("stage2-compute.json"), {"steps": summary["steps"], "tokens": summary["tokens"]})
    return summary
