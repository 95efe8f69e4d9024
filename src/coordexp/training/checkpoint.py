"""The resume state of a training run: one file, replaced whole, that holds everything the next step depends on."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from coordexp.errors import CheckpointError
from coordexp.infra.files import replacing
from coordexp.training.distributed import is_sharded, world
from coordexp.training.sharding import own_rows, whole_weights

STATE_NAME = "state.pt"


@dataclass(frozen=True, slots=True)
class ResumeState:
    """Where training stood: the next step to run, weights, optimizer, and the random generators (CPU, each GPU)."""

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    torch_rng: torch.Tensor
    cuda_rng: list[torch.Tensor]

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put everything back to where it stood."""
        sharded = is_sharded(model)
        model.load_state_dict(own_rows(model.state_dict(), self.model) if sharded else self.model)
        optimizer.load_state_dict(self.optimizer)
        torch.set_rng_state(self.torch_rng)
        if self.cuda_rng and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.cuda_rng)


def save_state(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Replace the resume state of a run, whole or not at all. The main process writes; a sharded model needs all here.

    Raises:
        OSError: the disk is full or not writable; the state before this one is still there.
    """
    state = {
        "step": step,
        "model": whole_weights(model) if is_sharded(model) else model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    if not world().is_main:
        return
    with replacing(folder / STATE_NAME) as temporary, temporary.open("wb") as out:
        try:
            torch.save(state, out)
        except RuntimeError as error:
            # torch's writer notices at its end that bytes are missing, and hides why.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load_state(folder: Path) -> ResumeState | None:
    """The resume state of a run, or None if there is none. Tensors only: nothing in it is executed.

    Raises:
        CheckpointError: the file is damaged; it was written whole, so the disk or another program changed it.
    """
    path = folder / STATE_NAME
    if not path.is_file():
        return None
    try:
        return ResumeState(**torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, TypeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: the resume state cannot be read ({error}). Expected what an interrupted run saved; delete "
            f"{folder} to start this stage at step 0."
        ) from error
