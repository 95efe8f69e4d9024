"""Stage 2: the data, objective and steps of the run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from coordexp.config.run import RunConfig
from coordexp.errors import ConfigError
from coordexp.infra.artefacts import write_sealed
from coordexp.infra.provenance import add_to_run_record, image_inputs
from coordexp.models.forward import input_table
from coordexp.models.loading import Checkpoint
from coordexp.packing.samples import SampleSource, SampleStore
from coordexp.rollout.engine import READOUT_KEYS
from coordexp.rollout.opening import START
from coordexp.rollout.records import Rollout, match_rollouts, parsed_rollout, read_generations, rollout_summary
from coordexp.rollout.stages import decode_request, make_reader
from coordexp.training.builders import (
    first_coord_id,
    load_for_training,
    make_encoder,
    own_slice,
)
from coordexp.training.distributed import world
from coordexp.training.eval_callback import make_eval_callback
from coordexp.training.rollout_pool import (
    MatchSchedule,
    Refresher,
    RolloutPool,
    engine_of_now,
    match_schedule,
    plan_refreshes,
)
from coordexp.training.session import GENERATION_TOKENS, Session, run_session, start_files
from coordexp.training.stage2_task import Stage2Task, StepPlan, plan_steps
from coordexp.training.step import Criterion


def train_stage2(run: RunConfig) -> dict[str, Any]:
    """Train channels A and B from the stage-1 checkpoint and the rollouts on file; also writes its cost.

    The cost is counted in tokens: those of training forwards, and those that all rollouts read and generated, including
    the ones on file if any step trains on rollouts.
    """
    _check_refresh(run)
    session = _session(run)
    optim = run.profile.stage2
    checkpoint = load_for_training(run.paths.run("stage1"), run.profile.launch.sharding, optim.precision)
    store = SampleStore(session.inputs["samples"])
    rollouts = _rollouts_on_file(run, checkpoint, store)
    rolled_out = [i for i in range(len(store)) if store[i].image_id in rollouts]
    plan = plan_steps(
        len(store),
        rolled_out,
        optim.samples_per_step,
        optim.steps,
        run.params.stage2.b_ratio,
        run.params.stage2_seed,
        run.params.stage2.refresh_steps,
    )
    encoder = make_encoder(checkpoint)
    matching = match_schedule(run.params, optim.steps)
    refresher = _refresher(run, session, checkpoint, store, plan, matching)
    task = Stage2Task(
        checkpoint.model,
        Criterion.stage2(run.params, first_coord_id(checkpoint), optim.steps),
        SampleSource(store, encoder, run.params.text.object_order, run.params.stage2_seed),
        RolloutPool(rollouts, matching, refresher),
        encoder,
        checkpoint.collator(run.paths.raw, run.profile.packing.pack_tokens),
        plan,
        own_slice(run.profile),
        optim.grad_monitor_every,
    )
    callback = make_eval_callback(run, "stage2", checkpoint, optim.steps)
    summary = run_session(session, checkpoint, task, callback)
    if world().is_main:
        used = rolled_out if any(step.channel == "B" for step in plan) else []
        on_file = sum(store[i].prompt_length + len(rollouts[store[i].image_id].ids) for i in used)
        fresh = sum(summary[f"refresh_{name}"] for name in GENERATION_TOKENS)
        cost = {"steps": summary["steps"], "tokens": summary["tokens"], "rollout_tokens": on_file + fresh}
        write_sealed(run.paths.run("stage2-compute.json"), cost)
        add_to_run_record(run.paths.run_record("stage2"), cost)
    return summary


def _check_refresh(run: RunConfig) -> None:
    """Raise ConfigError if fresh rollouts are requested but no engine can generate them."""
    refresh_steps, sharding, rollout = run.params.stage2.refresh_steps, run.profile.launch.sharding, run.profile.rollout
    if refresh_steps and rollout.engine == "hf" and sharding != "none":
        raise ConfigError(
            f"stage2.refresh_steps is {refresh_steps}, but launch.sharding is {sharding} and rollout.engine is hf, "
            "which cannot generate with sharded weights. Set rollout.engine: vllm, refresh_steps: 0 or sharding: none."
        )
    if refresh_steps and rollout.engine == "vllm" and rollout.servers != START:
        raise ConfigError(
            f"stage2.refresh_steps is {refresh_steps}, but rollout.servers is {list(rollout.servers)}: external "
            "servers do not have the weights in training. Set rollout.servers: [start], refresh_steps: 0 or engine: hf."
        )


def _rollouts_on_file(run: RunConfig, checkpoint: Checkpoint, store: SampleStore) -> dict[int, Rollout]:
    """The parsed rollouts of the stage `rollout`; writes a summary of their matching before any training."""
    generations = read_generations(run.paths.rollouts, len(input_table(checkpoint.model).weight))
    reader = make_reader(checkpoint)
    answers = {image_id: reader.parse(generation) for image_id, generation in generations.items()}
    rollouts = {i: parsed_rollout(i, generations[i], answer) for i, answer in answers.items()}
    samples = [sample for sample in (store[i] for i in range(len(store))) if sample.image_id in rollouts]
    if world().is_main:
        matched = match_rollouts([rollouts[s.image_id] for s in samples], samples, run.params.matching)
        reports = [answers[s.image_id].report for s in samples]
        write_sealed(run.paths.rollout_summary, rollout_summary(samples, matched, reports))
    return rollouts


def _session(run: RunConfig) -> Session:
    settings = run.params.model_dump(
        exclude={"profile": True, "stage1": True, "control": True, "decode": READOUT_KEYS, "eval": True}
    )
    inputs = {
        **start_files(run.paths.run("stage1")),
        "samples": run.paths.norm1000 / "train.parquet",
        "rollouts": run.paths.rollouts,
    }
    return Session(
        run=run,
        stage="stage2",
        settings=settings | {"optim": run.profile.stage2.model_dump(), "pack_tokens": run.profile.packing.pack_tokens},
        inputs=inputs | image_inputs(run.paths.raw),
        optim=run.profile.stage2,
        seed=run.params.stage2_seed,
    )


def _refresher(
    run: RunConfig,
    session: Session,
    checkpoint: Checkpoint,
    store: SampleStore,
    plan: list[StepPlan],
    matching: MatchSchedule,
) -> Refresher | None:
    """The generator of fresh rollouts; None if they are off."""
    if run.params.stage2.refresh_steps == 0:
        return None
    folder, stage2 = session.state_folder(), run.params.stage2
    request = decode_request(run, checkpoint.codec)
    sampled = request.params.model_copy(update={"temperature": stage2.refresh_temperature, "beams": 1})
    of_channel_b = {step: p.items for step, p in enumerate(plan) if p.channel == "B"}
    return Refresher(
        plan_refreshes(of_channel_b, stage2.refresh_steps),
        partial(engine_of_now, run, checkpoint, folder),
        make_reader(checkpoint).parse,
        request,
        store,
        len(input_table(checkpoint.model).weight),
        folder,
        checkpoint.model.model,
        replace(request, params=sampled),
        stage2.refresh_samples - 1,
        matching,
    )
