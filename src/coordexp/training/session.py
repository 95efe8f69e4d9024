"""What every training stage does around its task: load, train with resume, write checkpoint, log and metadata."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coordexp.config.profile import OptimConfig, TuningConfig
from coordexp.config.provenance import fingerprint, resume_folder, run_metadata, weight_files, write_json
from coordexp.models.adapters import apply_tuning, count_trainable
from coordexp.models.loading import Checkpoint, save_checkpoint
from coordexp.training.checkpoint import replace_folder
from coordexp.training.loop import LoopSettings, Task, train
from coordexp.training.schedule import cosine_schedule

log = logging.getLogger(__name__)
SAVE_EVERY_SECONDS = 60.0


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
    threads: int
    seed: int
    row_lr_factor: float
    out: Path


def start_files(folder: Path) -> dict[str, Path]:
    """The weights that a run starts from, as inputs by name."""
    files = weight_files(folder)
    return {"start": files[0]} if len(files) == 1 else {f"start/{path.name}": path for path in files}


def run_session(session: Session, checkpoint: Checkpoint, task: Task) -> dict[str, Any]:
    """Train and write the checkpoint folder; returns the summary that went into `run_metadata.json`."""
    if session.threads:
        torch.set_num_threads(session.threads)
    torch.manual_seed(session.seed)
    settings = {**session.settings, "tuning": session.tuning.model_dump()}
    key = fingerprint(settings, session.inputs.values())
    state = resume_folder(session.stage, key)
    log_path = state / "train_log.jsonl"
    started = time.monotonic()
    assert checkpoint.coord is not None
    undo = apply_tuning(checkpoint.model, session.tuning, checkpoint.coord)
    log.info("%s: %s parameters train", session.stage, f"{count_trainable(checkpoint.model):,}")
    train(checkpoint.model, task, _loop_settings(session), state, log_path)
    undo()  # a checkpoint is plain weights, adapters merged
    temporary = session.out.with_name(session.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_checkpoint(temporary, checkpoint.model, checkpoint.tokenizer)
    shutil.copyfile(log_path, temporary / "train_log.jsonl")
    summary = summarise_log(log_path)
    metadata = run_metadata(session.stage, settings, session.inputs, time.monotonic() - started, summary)
    write_json(temporary / "run_metadata.json", metadata)
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
    """Totals of a training log: steps, samples, tokens, seconds in steps, and the mean loss of the last tenth."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = rows[-max(1, len(rows) // 10) :]
    return {
        "steps": len(rows),
        "samples": int(sum(r["samples"] for r in rows)),
        "tokens": int(sum(r["tokens"] for r in rows)),
        "step_seconds": round(sum(r["time/step_s"] for r in rows), 1),
        "final_loss": round(sum(r["loss/total"] for r in last) / len(last), 4),
    }


def write_curve(log_path: Path, out: Path, names: Sequence[str] = ("loss/total",), every: int = 1) -> None:
    """Columns of a training log by step as TSV: means over `every` steps, empty where a name was not logged."""
    rows = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(["step", *names])]
    for first in range(0, len(rows), every):
        chunk = rows[first : first + every]
        found = [[row[name] for row in chunk if name in row] for name in names]
        means = [f"{sum(values) / len(values):.4f}" if values else "" for values in found]
        lines.append("\t".join([str(chunk[-1]["step"]), *means]))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
