"""Resume state and final checkpoints: written under a temporary name, then renamed, so that no half file is read."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

STATE_NAME = "state.pt"


@dataclass(frozen=True, slots=True)
class ResumeState:
    """Where training stood: the next step to run, and everything that step depends on."""

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    torch_rng: torch.Tensor


def fsync_file(path: Path) -> None:
    """Flush a file to the disk, so that the rename that follows never exposes an empty one."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def save_state(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Replace the resume state of a run atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
    }
    temporary = folder / f"{STATE_NAME}.tmp"
    torch.save(state, temporary)
    fsync_file(temporary)
    temporary.replace(folder / STATE_NAME)


def load_state(folder: Path) -> ResumeState | None:
    """The resume state of a run, or None if there is none. Tensors only: nothing in it is executed."""
    path = folder / STATE_NAME
    if not path.is_file():
        return None
    return ResumeState(**torch.load(path, map_location="cpu", weights_only=True))


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a finished folder into place, removing an older one."""
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
