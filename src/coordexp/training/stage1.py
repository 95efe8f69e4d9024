"""Stage 1 and the control that continues it: the data and steps of both runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import OptimConfig
from coordexp.config.run import RunConfig
from coordexp.errors import DataError
from coordexp.infra.foreign import Gate
from coordexp.infra.provenance import image_inputs
from coordexp.models.loading import Checkpoint
from coordexp.packing.planner import read_packs
from coordexp.packing.samples import SampleSource, SampleStore
from coordexp.training.builders import (
    first_coord_id,
    load_for_training,
    make_encoder,
    own_slice,
)
from coordexp.training.eval_callback import make_eval_callback
from coordexp.training.schedule import packs_for_budget, step_items
from coordexp.training.session import Session, run_session, start_files
from coordexp.training.step import Criterion, TeacherTask

COMPUTE = Gate("the compute of stage 2, as that stage writes it", DataError, "Run it again: dvc repro stage2.")
# A backward pass costs about twice its forward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), so a token that is
# only read or generated costs a third of a training token.
FORWARD_COST = 1 / 3
SHARED_KEYS = ("seed", "target", "sigma", "truncate", "temperature", "anneal")


def train_stage1(run: RunConfig) -> dict[str, Any]:
    """Train with teacher forcing on the planned packs, from the initial checkpoint."""
    checkpoint = load_for_training(run.paths.init, run.profile.launch.sharding, run.profile.stage1.precision)
    packs = read_packs(run.paths.packed / "plan.parquet")
    optim = run.profile.stage1
    packs_by_step = [
        [packs[i] for i in items]
        for items in step_items(len(packs), optim.packs_per_step, optim.steps, run.params.stage1_seed, "stage1/order")
    ]
    return _teach(run, "stage1", checkpoint, run.paths.init, packs_by_step, optim, run.params.stage1_seed)


def train_control(run: RunConfig) -> dict[str, Any]:
    """Continue stage 1 with the optimizer, schedule, steps and seed of stage 2, for its compute or its tokens.

    With the seed of stage 2, a repetition of stage 2 from one checkpoint also repeats the control: its noise belongs to
    the difference of the two.
    """
    start = run.paths.run("stage1")
    checkpoint = load_for_training(start, run.profile.launch.sharding, run.profile.stage2.precision)
    packs = read_packs(run.paths.packed / "plan.parquet")
    lengths = SampleStore(run.paths.norm1000 / "train.parquet").lengths()
    budget = control_tokens(read_compute(run.paths), run.params.control.budget)
    pack_tokens = [int(lengths[pack].sum()) for pack in packs]
    chosen = packs_for_budget(
        pack_tokens, budget, run.profile.stage2.steps, run.params.stage2_seed, "stage1-control/order"
    )
    packs_by_step = [[packs[i] for i in items] for items in chosen]
    return _teach(run, "stage1-control", checkpoint, start, packs_by_step, run.profile.stage2, run.params.stage2_seed)


def _teach(
    run: RunConfig,
    stage: str,
    checkpoint: Checkpoint,
    start: Path,
    packs_by_step: Sequence[Sequence[Sequence[int]]],
    optim: OptimConfig,
    seed: int,
) -> dict[str, Any]:
    data = run.paths.norm1000 / "train.parquet"
    collator = checkpoint.collator(run.paths.raw, run.profile.packing.pack_tokens)
    source = SampleSource(SampleStore(data), make_encoder(checkpoint), run.params.text.object_order, seed)
    criterion = Criterion.stage1(run.params, first_coord_id(checkpoint), len(packs_by_step))
    share, monitor_every = own_slice(run.profile), optim.grad_monitor_every
    task = TeacherTask(checkpoint.model, criterion, source, collator, packs_by_step, share, monitor_every)
    settings = run.params.model_dump(include={*SHARED_KEYS, "text", "stage1"}) | {
        "optim": optim.model_dump(),
        "stage": stage,
        "training_seed": seed,
    }
    session = Session(
        run=run,
        stage=stage,
        settings=settings | {"packs_by_step": sum(len(p) for p in packs_by_step)},
        inputs={**start_files(start), "samples": data, "plan": run.paths.packed / "plan.parquet"}
        | image_inputs(run.paths.raw),
        optim=optim,
        seed=seed,
    )
    callback = make_eval_callback(run, stage, checkpoint, len(packs_by_step))
    return run_session(session, checkpoint, task, callback)


def read_compute(paths: ProfilePaths) -> dict[str, int]:
    """The cost of stage 2: steps, tokens of training forwards, and tokens that its rollouts read and generated."""
    return COMPUTE.read_sealed(paths.run("stage2-compute.json"))


def control_tokens(compute: Mapping[str, int], budget: Literal["compute", "tokens"]) -> int:
    """The control's training tokens for the cost of stage 2; a rollout token counts as FORWARD_COST training tokens."""
    rollouts = compute["rollout_tokens"] if budget == "compute" else 0
    return compute["tokens"] + round(FORWARD_COST * rollouts)
