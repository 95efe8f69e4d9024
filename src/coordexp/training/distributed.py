"""One training run in several processes: each runs its share of a step's rows, then the gradients are summed.

Every loss is divided by the counts of the whole step (`objective_step.denominators`), which each process knows from the
plan alone. So the sum of the gradients is that of one process on all rows, weighted by tokens and not by processes,
however unequal the shares are. Each process holds all weights and the optimizer state, or with `launch.sharding: fsdp2`
its shard of them (training/sharding.py); only process 0 writes.

torchrun, or `launch` in coordexp.training.launch, starts the processes and tells them who they are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coordexp.infra.device import choose_device

# A process that died closes its connections, which ends the others at once; this is for one that hangs.
TIMEOUT = timedelta(minutes=20)
BUCKET_NUMBERS = 2**26  # gradients are summed in pieces of this size: 256 MiB of float32
_SUMMED = ("tokens", "samples", "time/wait_s")
_SUMMED_AREAS = ("loss/", "raw/")
_WEIGHTED_AREA = "coord_diag"
_WEIGHT = "coord_tokens"

Row = dict[str, float | str]


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


def gathered_row(row: Row) -> Row:
    """The log row of the whole step, from those of all processes."""
    if world().size == 1:
        return row
    rows: list[Row] = [{} for _ in range(world().size)]
    dist.all_gather_object(rows, row)
    return merge_rows(rows)


def merge_rows(rows: Sequence[Row]) -> Row:
    """Join the rows of parts of one step: losses and counts add up, diagnostics are averaged by coordinate tokens.

    A 90th percentile is averaged too, which is near that of all slots and not equal to it. Anything else is the same
    in every part that has it.
    """
    merged: Row = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        found = [(row, value) for row in rows if (value := row.get(name)) is not None]
        if isinstance(found[0][1], str):
            merged[name] = found[0][1]
        elif name in _SUMMED or name.startswith(_SUMMED_AREAS) or name.endswith(f"/{_WEIGHT}"):
            merged[name] = sum(_number(value) for _, value in found)
        elif name.startswith(_WEIGHTED_AREA):
            weights = [_number(row[f"{name.split('/')[0]}/{_WEIGHT}"]) for row, _ in found]
            merged[name] = sum(w * _number(v) for w, (_, v) in zip(weights, found, strict=True)) / sum(weights)
        else:
            merged[name] = found[0][1]
    return merged


def _number(value: float | str) -> float:
    assert not isinstance(value, str)
    return value
