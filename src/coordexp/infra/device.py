"""Where a model computes, and in which precision: decided here for everything that loads one."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from coordexp.errors import ConfigError

AUTO = "auto"


def choose_device(wanted: str = AUTO) -> torch.device:
    """The device that `wanted` names; "auto" is the GPU of this process (by LOCAL_RANK), or the CPU without one.

    Raises:
        ConfigError: there is no such device.
    """
    if wanted == AUTO:
        return _accelerator() or torch.device("cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)  # fails for a device that this machine or this build of torch does not have
    except (RuntimeError, AssertionError) as error:  # torch's CPU build asserts
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device {wanted!r} cannot be used ({reason}). Expected auto, cpu, cuda or cuda:N with an N that exists."
        ) from error
    return device


def _accelerator() -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def inference_dtype(device: torch.device) -> torch.dtype:
    """Weights of a model that only answers: bfloat16 on an accelerator; float32 on the CPU, where results repeat."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def inference_autocast(model: nn.Module) -> AbstractContextManager[object]:
    """Precision of a forward that only answers, whatever the surroundings: float32 on the CPU, bfloat16 on a GPU.

    A model in training has float32 weights there; without autocast its products would be plain float32.
    """
    parameter = next(model.parameters())
    kind = parameter.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" and parameter.dtype == torch.float32)
