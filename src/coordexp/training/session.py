"""What every training stage does around its task: load, train with resume, write checkpoint, log and metadata."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from coordexp.config.profile import OptimConfig, TuningConfig
from coordexp.infra.files import only_process, replace_folder, write_text
from coordexp.infra.provenance import code_hash, fingerprint, resume_folder, run_metadata, weight_files, write_json
from coordexp.models.adapters import apply_tuning, count_trainable
from coordexp.models.loading import METADATA, Checkpoint, checkpoint_hashes, save_checkpoint
from coordexp.training.distributed import is_sharded, world
from coordexp.training.loop import LoopSettings, Task, Watch, train
from coordexp.training.schedule import cosine_schedule
from coordexp.training.sharding import shard_model, whole_weights, will_shard

log = logging.getLogger(__name__)
SAVE_EVERY_SECONDS = 60.0
LOG_NAME = "train_log.jsonl"
GENERATION_TOKENS = ("prompt_tokens", "generated_tokens")
LEAST_COORD_MASS = 0.5
# Whatever a training step runs: a state that older code left is not gone on with.
CODE_LAYERS = ("geometry", "losses", "matching", "models", "packing", "records", "rollout", "text", "training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One training run: its name, what identifies it, and where it ends up.

    `settings` holds every parameter that changes the result, `inputs` the files it reads; both are fingerprinted.
    """

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]
    optim: OptimConfig
    tuning: TuningConfig
    steps: int
    seed: int
    row_lr_factor: float
    out: Path
    sharding: str = "none"  # as `launch.sharding`; like the number of processes, it changes no result

    @property
    def tracked(self) -> dict[str, Any]:
        """Everything that is set and changes the result."""
        return {**self.settings, "tuning": self.tuning.model_dump()}

    def state_folder(self) -> Path:
        """Where this very run keeps what an interrupted one goes on from."""
        key = fingerprint({**self.tracked, "code": code_hash(CODE_LAYERS)}, self.inputs.values())
        return resume_folder(self.stage, key)


class Looks(Watch, Protocol):
    """A watch that keeps what it saw, beside the resume state while the run lasts, then beside the checkpoint."""

    def open(self, folder: Path) -> None:
        """Keep it there."""
        ...

    def hand_over(self, folder: Path) -> None:
        """Copy all of it into the finished checkpoint."""
        ...

    def seconds(self) -> float:
        """How long the looks took."""
        ...


def start_files(folder: Path) -> dict[str, Path]:
    """The weights that a run starts from, as inputs by name."""
    files = weight_files(folder)
    return {"start": files[0]} if len(files) == 1 else {f"start/{path.name}": path for path in files}


def run_session(session: Session, checkpoint: Checkpoint, task: Task, monitor: Looks) -> dict[str, Any]:
    """Train and write the checkpoint folder; returns the summary that went into `run_metadata.json`.

    Of several processes, all train; the main one writes, and the others return an empty summary.

    Raises:
        Interrupted: on SIGINT or SIGTERM, with the state saved; the same call goes on from there.
        BusyError: another process runs the same session.
    """
    torch.manual_seed(session.seed)
    state = session.state_folder()
    assert checkpoint.coord is not None
    undo = apply_tuning(checkpoint.model, session.tuning, checkpoint.coord)
    if will_shard(session.sharding):
        shard_model(checkpoint.model)
    if not world().is_main:
        train(checkpoint.model, task, _loop_settings(session), state, state / LOG_NAME)
        if is_sharded(checkpoint.model):
            whole_weights(checkpoint.model)  # gives the main process what it writes
        return {}
    log.info("%s: %s parameters train", session.stage, f"{count_trainable(checkpoint.model):,}")
    with only_process(state):
        return _run_main(session, checkpoint, task, monitor, undo)


def _run_main(
    session: Session, checkpoint: Checkpoint, task: Task, monitor: Looks, undo: Callable[[], None]
) -> dict[str, Any]:
    state = session.state_folder()
    log_path = state / LOG_NAME
    started = time.monotonic()
    monitor.open(state)
    train(checkpoint.model, task, _loop_settings(session), state, log_path, monitor)
    weights = whole_weights(checkpoint.model) if is_sharded(checkpoint.model) else None
    undo()  # a checkpoint is plain weights, adapters merged
    temporary = session.out.with_name(session.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_checkpoint(temporary, checkpoint.model, checkpoint.tokenizer, checkpoint.pixels, weights)
    shutil.copyfile(log_path, temporary / LOG_NAME)
    monitor.hand_over(temporary)
    summary = summarise_log(log_path) | {"monitor_seconds": monitor.seconds()}
    metadata = run_metadata(session.stage, session.tracked, session.inputs, time.monotonic() - started, summary)
    write_json(temporary / METADATA, metadata | {"files": checkpoint_hashes(temporary)})
    warn_of_collapse(log_path)
    replace_folder(temporary, session.out)
    shutil.rmtree(state)
    return summary


def _loop_settings(session: Session) -> LoopSettings:
    optim = session.optim
    return LoopSettings(
        steps=session.steps,
        schedule=cosine_schedule(session.steps, optim.warmup_steps),
        lr=optim.lr,
        optimizer=optim.optimizer,
        weight_decay=optim.weight_decay,
        row_lr_factor=session.row_lr_factor,
        max_grad_norm=optim.max_grad_norm,
        precision=optim.precision,
        log_every=optim.log_every,
        save_every_seconds=SAVE_EVERY_SECONDS,
    )


def summarise_log(path: Path) -> dict[str, Any]:
    """Totals of a training log: steps, samples, tokens, seconds in steps, and the mean loss of the last tenth.

    `tokens` went through a training forward; those that fresh rollouts read and wrote are counted apart.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = rows[-max(1, len(rows) // 10) :]
    return {
        "steps": len(rows),
        "samples": int(sum(r["samples"] for r in rows)),
        "tokens": int(sum(r["tokens"] for r in rows)),
        **{f"refresh_{name}": int(sum(r.get(f"rollout/{name}", 0) for r in rows)) for name in GENERATION_TOKENS},
        "step_seconds": round(sum(r["time/step_s"] for r in rows), 1),
        "final_loss": round(sum(r["loss/total"] for r in last) / len(last), 4),
    }


def warn_of_collapse(path: Path) -> None:
    """Say loudly that a model no longer, or not yet, answers a coordinate slot with a coordinate token."""
    name = "coord_diag/coord_vocab_mass_mean"
    masses = [row[name] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if name in row]
    last = masses[-max(1, len(masses) // 10) :]
    if last and sum(last) / len(last) < LEAST_COORD_MASS:
        log.warning(
            "the probability of coordinate tokens where one belongs is %.3f at the end of training, expected above %s: "
            "answers will not parse. Raise gate_weight, or train longer.",
            sum(last) / len(last),
            LEAST_COORD_MASS,
        )


def write_curve(log_path: Path, out: Path, names: Sequence[str] = ("loss/total",), every: int = 1) -> None:
    """Columns of a training log by step as TSV: means over `every` steps, empty where a name was not logged."""
    rows = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]
    lines = ["\t".join(["step", *names])]
    for first in range(0, len(rows), every):
        chunk = rows[first : first + every]
        found = [[row[name] for row in chunk if name in row] for name in names]
        means = [f"{sum(values) / len(values):.4f}" if values else "" for values in found]
        lines.append("\t".join([str(chunk[-1]["step"]), *means]))
    write_text(out, "\n".join(lines) + "\n")
