"""What every training stage does around its task: load, train with resume, write checkpoint, log and metadata."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coordexp.config.paths import RUN_METADATA, TRAIN_LOG
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
from coordexp.training.loop import Task, train
from coordexp.training.sharding import shard_model, whole_weights, will_shard

log = logging.getLogger(__name__)
START = "start"
GENERATION_TOKENS = ("prompt_tokens", "generated_tokens")
LEAST_COORD_MASS = 0.5
CURVE_POINTS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One training run: its stage, how it steps, and what identifies it.

    `settings` holds every parameter that changes the result, `inputs` the files it reads; both are fingerprinted.
    """

    run: RunConfig
    stage: str
    optim: OptimConfig
    seed: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]

    @property
    def tracked(self) -> dict[str, Any]:
        """Everything that is set and changes the result."""
        return {**self.settings, "tuning": self.run.profile.tuning.model_dump()}

    def state_folder(self) -> Path:
        """Where this very run keeps what an interrupted one goes on from."""
        # A state that older code left is not gone on with.
        key = fingerprint({**self.tracked, "code": code_hash(__package__)}, self.inputs.values())
        return resume_folder(self.stage, key)

    def start(self) -> str:
        """What identifies the weights that the run starts from."""
        return fingerprint({}, [path for name, path in self.inputs.items() if name.partition("/")[0] == START])


def start_hash(folder: Path) -> str:
    """What `Session.start` gives for a run that starts from this checkpoint."""
    return fingerprint({}, weight_files(folder))


def start_files(folder: Path) -> dict[str, Path]:
    """The weights that a run starts from, as inputs by name."""
    files = weight_files(folder)
    return {START: files[0]} if len(files) == 1 else {f"{START}/{path.name}": path for path in files}


def run_session(session: Session, checkpoint: Checkpoint, task: Task, callback: EvalCallback) -> dict[str, Any]:
    """Train and write the checkpoint folder; returns the summary that went into `run_metadata.json`.

    If another process runs the same session, this one waits for its end.

    Of several processes, all train; the main one writes, and the others return an empty summary.

    Raises:
        Interrupted: on SIGINT or SIGTERM, with the state saved; the same call goes on from there.
    """
    torch.manual_seed(stream_seed(session.seed, "train/torch"))
    profile, state = session.run.profile, session.state_folder()
    assert checkpoint.coord is not None
    plan, shards = training_plan(session.optim.precision, world().device), will_shard(profile.launch.sharding)
    # Shards of one layer are of one format.
    undo = apply_tuning(checkpoint.model, profile.tuning, checkpoint.coord, plan.trained if shards else plan.frozen)
    if shards:
        shard_model(checkpoint.model, session.optim.precision)
    callback.folder = state
    out = session.run.paths.run(session.stage)
    lacking = partial(lacking_room, out, sum(4 * p.numel() for p in checkpoint.model.parameters()))
    if fault := lacking():
        raise fault  # hours before it would come
    log.info("%s: %s parameters train", session.stage, f"{count_trainable(checkpoint.model):,}")
    with ExitStack() as held:
        from_main(f"the state of {session.stage}", lambda: _hold(held, state, session.stage))
        hold_threads(state, log, writes=world().is_main)
        with shown(callback, session.run.params.profile, session.stage) as watched:
            train(
                checkpoint.model, task, session.optim, state, state / TRAIN_LOG,
                save_every_seconds=profile.launch.save_every_seconds, start=session.start(), callback=watched,
                lacking=lacking,
            )  # fmt: skip
        weights = whole_weights(checkpoint.model) if is_sharded(checkpoint.model) else None
        if not world().is_main:
            return {}
        undo()  # a checkpoint is plain weights, adapters merged
        try:
            return _finish(session, state, checkpoint, weights, callback)
        finally:
            remove(_temporary(out))


def _hold(held: ExitStack, state: Path, stage: str) -> list[None]:
    """Hold the state of a run in the main process, for all of them; another run of the same is waited for."""
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
    """Put the checkpoint with log, results and metadata into its place, and forget the resume state."""
    log_path, out = state / TRAIN_LOG, session.run.paths.run(session.stage)
    temporary = _temporary(out)
    remove(temporary)
    summary = summarise_log(log_path)
    with sealing(temporary):
        save_checkpoint(temporary, checkpoint, weights)
        rows = without_clock(read_rows(log_path))
        write_text(temporary / TRAIN_LOG, "".join(json.dumps(row) + "\n" for row in rows))
        callback.copy_to(temporary)
        metadata = run_metadata(session.stage, session.tracked, session.inputs, summary)
        write_json(temporary / RUN_METADATA, metadata)
    warn_of_collapse(log_path)
    replace_folder(temporary, out)
    seconds = summed_seconds(log_path) | {"monitor_seconds": callback.seconds()}
    add_to_run_record(session.run.paths.run_record(session.stage), seconds)
    finish(state)
    return summary


def _temporary(out: Path) -> Path:
    """Where a checkpoint is written, until it is whole."""
    return out.with_name(f"{out.name}.tmp")


def summarise_log(path: Path) -> dict[str, Any]:
    """Totals of a training log: steps, samples, tokens, and the mean loss of the last tenth.

    `tokens` went through a training forward; those that fresh rollouts read and wrote are counted apart.
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
    """Seconds in steps, and of these (a sum over processes) those in which one waited for its batches."""
    table = read_log(path)
    names = {"step_seconds": "time/step_s", "wait_seconds": "time/wait_s"}
    return {name: round(float(logged(table, column).sum()), 1) for name, column in names.items()}


def warn_of_collapse(path: Path) -> None:
    """Say loudly that a model no longer, or not yet, answers a coordinate slot with a coordinate token."""
    mass = ends(read_log(path), "coord_diag/coord_vocab_mass_mean")
    if mass and mass[1] < LEAST_COORD_MASS:
        log.warning(
            "the probability of coordinate tokens where one belongs is %.3f at the end of training, expected above %s: "
            "answers will not parse. Raise gate_weight, or train longer.",
            mass[1],
            LEAST_COORD_MASS,
        )


def write_curve(log_path: Path, out: Path, names: Sequence[str] = (), every: int = 0) -> None:
    """Columns of a training log by step as TSV: means over `every` steps, empty where a name was not logged.

    Without names: the mean error of E[k] in bins and every term of the objective without its weight, so that runs under
    other weights compare. `every` 0 makes at most CURVE_POINTS rows: git holds the curves of every experiment.
    """
    log = read_log(log_path)
    unweighted = [column for column in log.columns if column.startswith("raw/")]
    table = log.reindex(columns=list(names) or [BIN_ERROR, *unweighted]).reset_index()
    chunk = table.index // (every or -(-len(log) // CURVE_POINTS))
    means = table.groupby(chunk).mean().assign(step=table["step"].groupby(chunk).last())
    write_text(out, means.to_csv(sep="\t", index=False, float_format="%.4f"))
