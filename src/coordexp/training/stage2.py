"""Stage 2 as a run: which data, which objective, which steps."""

from __future__ import annotations

from typing import Any

from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.provenance import image_inputs, write_json
from coordexp.config.schema import Params
from coordexp.errors import ConfigError
from coordexp.models.loading import Checkpoint
from coordexp.packing.samples import SampleStore
from coordexp.rollout.decode import EMITTED
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.records import read_rollouts
from coordexp.rollout.stages import allowed_names, decode_settings, make_reader
from coordexp.training.builders import (
    ROW_LR_FACTOR,
    load_for_training,
    make_collator,
    make_encoder,
    own_share,
    soft_context,
    stage2_objective,
)
from coordexp.training.channel_b_builders import channel_b_settings, match_schedule
from coordexp.training.distributed import world
from coordexp.training.monitor import make_monitor
from coordexp.training.rollout_pool import Refresher, RolloutPool, plan_refreshes
from coordexp.training.sample_source import SampleSource
from coordexp.training.session import GENERATION_TOKENS, Session, run_session, start_files
from coordexp.training.stage2_task import Stage2Task, StepPlan, plan_steps

READOUT_KEYS = {"score", "box"}  # of `decode`: how an answer is judged, not how it is generated


def train_stage2(params: Params, profile: Profile, paths: ProfilePaths) -> dict[str, Any]:
    """Channels A and B from the stage-1 checkpoint and the rollouts on file; also writes what compute it took.

    The compute is in tokens of training forwards, which the control is given too, and apart from them the tokens that
    fresh rollouts read and wrote, which it is not.
    """
    if params.stage2.refresh_steps and profile.launch.sharding != "none":
        raise ConfigError(
            f"stage2.refresh_steps is {params.stage2.refresh_steps}, but launch.sharding is {profile.launch.sharding}: "
            "sharded weights do not generate. Set one of them to 0 or none."
        )
    session = _session(params, profile, paths)
    optim = profile.stage2
    checkpoint = load_for_training(paths.run("stage1"), profile.launch.sharding)
    store, rollouts = SampleStore(session.inputs["samples"]), read_rollouts(session.inputs["rollouts"])
    rolled_out = [i for i in range(len(store)) if store[i].image_id in rollouts]
    plan = plan_steps(
        len(store), rolled_out, optim.samples_per_step, optim.steps, params.stage2.b_ratio, params.stage2_seed + 1
    )
    encoder = make_encoder(params, checkpoint)
    refresher = _refresher(params, profile, paths, session, checkpoint, plan)
    task = Stage2Task(
        checkpoint.model,
        stage2_objective(params, checkpoint, optim.steps),
        soft_context(params, checkpoint),
        SampleSource(store, encoder, params.text.object_order, params.stage2_seed),
        RolloutPool(rollouts, match_schedule(params, optim.steps), refresher),
        encoder,
        channel_b_settings(params),
        make_collator(checkpoint, paths.raw, profile.packing.pack_tokens),
        plan,
        own_share(profile),
        params.stage2.a1_coord_weight,
        optim.grad_monitor_every,
    )
    monitor = make_monitor(params.text.codec, profile, paths, "stage2", checkpoint, optim.steps)
    summary = run_session(session, checkpoint, task, monitor)
    if world().is_main:
        names = ("steps", "tokens", *(f"refresh_{name}" for name in GENERATION_TOKENS))
        write_json(paths.run("stage2-compute.json"), {name: summary[name] for name in names})
    return summary


def _session(params: Params, profile: Profile, paths: ProfilePaths) -> Session:
    settings = params.model_dump(exclude={"profile": True, "stage1": True, "decode": READOUT_KEYS, "eval": True})
    inputs = {
        **start_files(paths.run("stage1")),
        "samples": paths.norm1000 / "train.parquet",
        "rollouts": paths.run("rollout") / "rollouts.jsonl",
    }
    return Session(
        stage="stage2",
        settings=settings | {"optim": profile.stage2.model_dump(), "pack_tokens": profile.packing.pack_tokens},
        inputs=inputs | image_inputs(paths.raw),
        optim=profile.stage2,
        tuning=profile.tuning,
        steps=profile.stage2.steps,
        sharding=profile.launch.sharding,
        seed=params.stage2_seed,
        row_lr_factor=ROW_LR_FACTOR,
        out=paths.run("stage2"),
    )


def _refresher(
    params: Params,
    profile: Profile,
    paths: ProfilePaths,
    session: Session,
    checkpoint: Checkpoint,
    plan: list[StepPlan],
) -> Refresher | None:
    """What makes fresh rollouts; None if they are off. Always the engine in memory: no server knows these weights."""
    if params.stage2.refresh_steps == 0:
        return None
    of_channel_b = {step: p.items for step, p in enumerate(plan) if p.channel == "B"}
    codec = params.text.codec
    return Refresher(
        plan_refreshes(of_channel_b, params.stage2.refresh_steps),
        HfEngine(checkpoint, paths.raw, profile.rollout.batch_images),
        make_reader(checkpoint, codec, EMITTED, {}).parse,
        decode_settings(params, codec, allowed_names(params, paths)),
        SampleStore(session.inputs["samples"]),
        session.state_folder(),
    )
