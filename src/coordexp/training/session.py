"""The common part of all training stages: train with resume, then write checkpoint, log and metadata."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coordexp.config.paths import KEPT_STEPS, RUN_METADATA, TRAIN_LOG
from coordexp.config.profile import OptimConfig
from coordexp.config.run import RunConfig
from coordexp.infra.artefacts import sealing
from coordexp.infra.code_hash import code_hash
from coordexp.infra.device import training_plan
from coordexp.infra.files import lacking_room, remove, replace_folder, write_text
from coordexp.infra.logs import BIN_ERROR, ends, logged, read_log, read_rows, without_clock
from coordexp.infra.provenance import (
    add_to_run_record,
    fingerprint,
    run_metadata,
    weight_files,
    write_json,
)
from coordexp.infra.random_streams import stream_seed
from coordexp.infra.resume import finish, holding, keep_within_budget, resume_folder, resume_root
from coordexp.infra.threads import hold_threads
from coordexp.models.adapters import apply_tuning, count_trainable
from coordexp.models.loading import Checkpoint, save_checkpoint
from coordexp.training.distributed import from_main, is_sharded, world
from coordexp.training.eval_callback import EvalCallback
from coordexp.training.live import shown
from coordexp.training.loop import Callback, Callbacks, Task, train
from coordexp.training.sharding import plain_weights, shard_model, whole_weights, will_shard

log = logging.getLogger(__name__)
START = "start"
GENERATION_TOKENS = ("prompt_tokens", "generated_tokens")
LEAST_COORD_MASS = 0.5
CURVE_POINTS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One training run: its stage, its optimizer settings, and what identifies it.

    `settings` holds every parameter that changes the result, `inputs` the files that it reads; both are fingerprinted.
    """

    run: RunConfig
    stage: str
    optim: OptimConfig
    seed: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]

    @property
    def tracked(self) -> dict[str, Any]:
        """All settings that change the result."""
        return {**self.settings, "tuning": self.run.profile.tuning.model_dump()}

    def state_folder(self) -> Path:
        """The folder of this run's saved states, from which it resumes after an interruption."""
        # The key includes the code: a state that other code saved is not resumed.
        key = fingerprint({**self.tracked, "code": code_hash(__package__)}, self.inputs.values())
        return resume_folder(self.stage, key)

    def start(self) -> str:
        """The identity of the weights that the run starts from."""
        return fingerprint({}, [path for name, path in self.inputs.items() if name.partition("/")[0] == START])


def start_hash(folder: Path) -> str:
    """The value of `Session.start` for a run that starts from this checkpoint."""
    return fingerprint({}, weight_files(folder))


def start_files(folder: Path) -> dict[str, Path]:
    """The weight files that a run starts from, by input name."""
    files = weight_files(folder)
    return {START: files[0]} if len(files) == 1 else {f"{START}/{path.name}": path for path in files}


@dataclass(frozen=True, slots=True)
class Keeper(Callback):
    """Keeps a complete checkpoint after every `every_steps`-th step except the last; it loads like the final one."""

    checkpoint: Checkpoint
    folder: Path
    every_steps: int  # 0 means never
    steps: int

    @property
    def n_kept(self) -> int:
        """Number of checkpoints that a complete run keeps."""
        return max(0, self.steps - 1) // self.every_steps if self.every_steps else 0

    def on_train_begin(self, done_steps: int) -> None:
        """Delete checkpoints of steps that will run again."""
        for path in self.folder.glob("step_*") if world().is_main else ():
            if int(path.name.removeprefix("step_")) > done_steps:
                remove(path)

    def on_step_end(self, done_steps: int) -> None:
        """Keep the checkpoint if this step is due."""
        if not self.every_steps or done_steps % self.every_steps or done_steps == self.steps:
            return
        weights = plain_weights(self.checkpoint.model)
        if world().is_main:
            temporary = self.folder / "new"
            remove(temporary)
            with sealing(temporary):
                save_checkpoint(temporary, self.checkpoint, weights)
            replace_folder(temporary, self.folder / f"step_{done_steps:06d}")


def run_session(session: Session, checkpoint: Checkpoint, task: Task, callback: EvalCallback) -> dict[str, Any]:
    """Train and write the checkpoint folder; returns the summary that went into `run_metadata.json`.

    If another command runs the same session, this one waits until it ends. With several processes, all of them train;
    the main one writes, and the others return an empty summary.

    Raises:
        Interrupted: on SIGINT or SIGTERM, with the state saved; the same call resumes.
    """
    torch.manual_seed(stream_seed(session.seed, "train/torch"))
    profile, state = session.run.profile, session.state_folder()
    assert checkpoint.coord is not None
    plan, shards = training_plan(session.optim.precision, world().device), will_shard(profile.launch.sharding)
    # FSDP needs one dtype per layer.
    undo = apply_tuning(checkpoint.model, profile.tuning, checkpoint.coord, plan.trained if shards else plan.frozen)
    if shards:
        shard_model(checkpoint.model, session.optim.precision)
    callback.folder = state
    out, steps = session.run.paths.run(session.stage), session.optim.steps
    keeper = Keeper(checkpoint, state / KEPT_STEPS, profile.monitor.keep_every_steps, steps)
    n_bytes = sum(4 * p.numel() for p in checkpoint.model.parameters())
    lacking = partial(lacking_room, out, (1 + keeper.n_kept) * n_bytes)
    if fault := lacking():
        raise fault  # now instead of after hours of training
    log.info("%s: %s trainable parameters", session.stage, f"{count_trainable(checkpoint.model):,}")
    with ExitStack() as held:
        from_main(f"the state of {session.stage}", lambda: _hold(held, state, session.stage))
        hold_threads(state, log, writes=world().is_main)
        with shown(callback, session.run.params.profile, session.stage) as watched:
            train(
                checkpoint.model, task, session.optim, state, state / TRAIN_LOG,
                save_every_seconds=profile.launch.save_every_seconds, start=session.start(),
                callback=Callbacks((watched, keeper)), lacking=lacking,
            )  # fmt: skip
        weights = whole_weights(checkpoint.model) if is_sharded(checkpoint.model) else None
        if not world().is_main:
            return {}
        undo()  # a checkpoint holds plain weights, with adapters merged
        try:
            return _finish(session, state, checkpoint, weights, callback)
        finally:
            remove(_temporary(out))


def _hold(held: ExitStack, state: Path, stage: str) -> list[None]:
    """Lock the state of a run, in the main process on behalf of all; wait for another command that holds it."""
    held.enter_context(holding(state, stage))
    keep_within_budget(resume_root())
    return []


def _finish(
    session: Session,
    state: Path,
    checkpoint: Checkpoint,
    weights: dict[str, Tensor] | None,
    callback: EvalCallback,
) -> dict[str, Any]:
    """Write the checkpoint with log, results and metadata to its final folder, and delete the saved states."""
    log_path, out = state / TRAIN_LOG, session.run.paths.run(session.stage)
    temporary = _temporary(out)
    remove(temporary)
    summary = summarise_log(log_path)
    with sealing(temporary):
        save_checkpoint(temporary, checkpoint, weights)
        rows = without_clock(read_rows(log_path))
        write_text(temporary / TRAIN_LOG, "".join(json.dumps(row) + "\n" for row in rows))
        callback.copy_to(temporary)
        if (state / KEPT_STEPS).is_dir():
            shutil.copytree(state / KEPT_STEPS, temporary / KEPT_STEPS)
        metadata = run_metadata(session.stage, session.tracked, session.inputs, summary)
        write_json(temporary / RUN_METADATA, metadata)
    warn_of_collapse(log_path)
    replace_folder(temporary, out)
    seconds = summed_seconds(log_path) | {"monitor_seconds": callback.seconds()}
    taken = {name: summary[name] for name in ("tokens", *(f"refresh_{name}" for name in GENERATION_TOKENS))}
    add_to_run_record(session.run.paths.run_record(session.stage), seconds | taken)
    finish(state)
    return summary


def _temporary(out: Path) -> Path:
    """The folder in which a checkpoint is written until it is complete."""
    return out.with_name(f"{out.name}.tmp")


def summarise_log(path: Path) -> dict[str, Any]:
    """Totals of a training log: steps, samples, tokens, and the mean loss of the last tenth.

    `tokens` counts tokens of training forwards; tokens that fresh rollouts read and generated are counted separately.
    """
    table = read_log(path)
    last = ends(table, "loss/total")
    assert last is not None, "every step logs its loss"
    return {
        "steps": len(table),
        "samples": int(table["samples"].sum()),
        "tokens": int(table["tokens"].sum()),
        **{f"refresh_{name}": int(logged(table, f"rollout/{name}").sum()) for name in GENERATION_TOKENS},
        "final_loss": round(last[1], 4),
    }


def summed_seconds(path: Path) -> dict[str, float]:
    """Seconds spent in steps, and seconds spent waiting for batches (summed over processes)."""
    table = read_log(path)
    names = {"step_seconds": "time/step_s", "wait_seconds": "time/wait_s"}
    return {name: round(float(logged(table, column).sum()), 1) for name, column in names.items()}


def warn_of_collapse(path: Path) -> None:
    """Warn if the model does not predict coordinate tokens in coordinate slots."""
    mass = ends(read_log(path), "coord_diag/coord_vocab_mass_mean")
    if mass and mass[1] < LEAST_COORD_MASS:
        log.warning(
            "at the end of training, the probability of coordinate tokens in coordinate slots is %.3f, expected above "
            "%s: answers will not parse. Raise gate_weight, or train longer.",
            mass[1],
            LEAST_COORD_MASS,
        )


def write_curve(log_path: Path, out: Path, names: Sequence[str] = (), every: int = 0) -> None:
    """Write columns of a training log as TSV: means over `every` steps, empty where a name was not logged.

    The default columns are the mean error of E[k] in bins and every unweighted term of the objective, so that runs
    with different weights are comparable. `every` 0 gives at most CURVE_POINTS rows, because the curves of every
    experiment are kept in git.
    """
    log = read_log(log_path)
    unweighted = [column for column in log.columns if column.startswith("raw/")]
    table = log.reindex(columns=list(names) or [BIN_ERROR, *unweighted]).reset_index()
    chunk = table.index // (every or -(-len(log) // CURVE_POINTS))
    means = table.groupby(chunk).mean().assign(step=table["step"].groupby(chunk).last())
    write_text(out, means.to_csv(sep="\t", index=False, float_format="%.4f"))
