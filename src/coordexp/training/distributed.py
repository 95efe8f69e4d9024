"""One training run in several processes: each runs its share of a step's rows, then the gradients are summed.

Every loss is divided by the counts of the whole step (`step.step_counts`), which each process knows from the
plan alone. So the sum of the gradients is that of one process on all rows, weighted by tokens and not by processes,
however unequal the shares are. Each process holds all weights and the optimizer state, or with `launch.sharding: fsdp2`
its shard of them (training/sharding.py); only process 0 writes.

torchrun, or `launch` in coordexp.training.launch, starts the processes and tells them who they are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from coordexp.infra.device import choose_device
from coordexp.losses.coord_terms import CoordDiagnostics

# A process that died closes its connections, which ends the others at once; this is for one that hangs.
TIMEOUT = timedelta(minutes=20)
BUCKET_NUMBERS = 2**26  # gradients are summed in pieces of this size: 256 MiB of float32
_SUMMED = ("tokens", "samples", "time/wait_s")
_SUMMED_AREAS = ("loss/", "raw/")

Made = TypeVar("Made")
COMPUTE = "compute_in_forward"  # a method of a sharded model: gathers like `forward`, then calls what it is given

Logged = float | str | CoordDiagnostics  # a number, the channel as a letter, or diagnostics as sums that add up
Row = dict[str, Logged]  # of a part of a step
LogRow = dict[str, float | str]  # of a whole step


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run, and where its model lives."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0


@cache
def world() -> World:
    """Join the other processes, if torchrun started any, and say who this one is; all calls give the same answer."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device()
    if size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    if rank > 0:
        logging.getLogger("coordexp").setLevel(logging.WARNING)
    return World(rank, size, device)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only its rows of the weights."""
    return isinstance(model, FSDPModule)


def in_forward(model: nn.Module, compute: Callable[[], Made]) -> Made:
    """What `compute` makes of the model, whose weights are in place until the losses in it were back-propagated.

    Everything that reads weights, the head included, belongs into `compute`; losses are found in dataclasses, too.
    """
    return cast(Made, getattr(model, COMPUTE)(compute)) if is_sharded(model) else compute()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes in place; one that a process did not compute counts as zero."""
    if world().size == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # every process must bring the same tensors in the same order
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([p.grad for p in trained if p.grad is not None]):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat)
        for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(total.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    filled = BUCKET_NUMBERS
    for grad in grads:
        if filled + grad.numel() > BUCKET_NUMBERS or buckets[-1][0].dtype != grad.dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(grad)
        filled += grad.numel()
    return buckets


def any_process(flag: bool) -> bool:
    """True on every process if it is true on one: a signal may reach only some of them, or between two steps."""
    if world().size == 1:
        return flag
    votes = torch.tensor(float(flag), device=world().device)
    dist.all_reduce(votes)
    return bool(votes > 0)


def wait_for_all() -> None:
    """Return when every process has come here; a process that died ends the others."""
    any_process(False)


def gathered_row(row: Row) -> LogRow:
    """The log row of the whole step, from those of all processes; diagnostics are summarised as `<name>/<metric>`."""
    if world().size > 1:
        rows: list[Row] = [{} for _ in range(world().size)]
        dist.all_gather_object(rows, row)
        row = merge_rows(rows)
    logs: LogRow = {}
    for name, value in row.items():
        if isinstance(value, CoordDiagnostics):
            logs |= {f"{name}/{metric}": number for metric, number in value.summary().items()}
        else:
            logs[name] = value
    return logs


def merge_rows(rows: Sequence[Row]) -> Row:
    """Join the rows of parts of one step: losses, counts and diagnostics add up; the rest is the same in every part."""
    merged: Row = {}
    for row in rows:
        for name, value in row.items():
            before = merged.get(name)
            is_summed = isinstance(value, CoordDiagnostics) or name in _SUMMED or name.startswith(_SUMMED_AREAS)
            if before is None:
                merged[name] = value
            elif is_summed:
                merged[name] = before + value  # type: ignore[operator]  # of one kind, as they have one name
    return merged
