"""One training run in several processes: each runs its share of a step's rows, then the gradients are summed.

Every loss is divided by the counts of the whole step (`step.step_counts`), which each process knows from the
plan alone. So the sum of the gradients is that of one process on all rows, weighted by tokens and not by processes,
however unequal the shares are. Each process holds all weights and the optimizer state, or with `launch.sharding: fsdp2`
its shard of them (training/sharding.py); only process 0 writes.

torchrun, or `launch` in coordexp.training.launch, starts the processes and tells them who they are.

Sums are for steps, whose parts take the same time everywhere. Work of unequal length (`shared_out`: answers, fresh
rollouts) ends in a meeting at the processes' key-value store: who waits there sees whether the others still get on, and
says for whom it waits. A collective would be silent, and NCCL ends a run that waits too long for good reason.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from threading import Event, Thread
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from coordexp.errors import TrainingError
from coordexp.infra.device import choose_device
from coordexp.losses.coord_terms import CoordDiagnostics

log = logging.getLogger(__name__)

# A process that died closes its connections, which ends the others at once; this is for one that hangs in a step.
TIMEOUT = timedelta(minutes=20)
BEAT_EVERY_S = 5.0  # a process at work shows at most so often that it gets on
SILENCE_S = 300.0  # one that has not shown it for so long is given up
SAID_EVERY_S = 60.0  # who waits says so
BUCKET_NUMBERS = 2**26  # gradients are summed in pieces of this size: 256 MiB of float32
_SUMMED = ("tokens", "samples", "time/wait_s")
_SUMMED_AREAS = ("loss/", "raw/")

Made = TypeVar("Made")
Item = TypeVar("Item")
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
        backend = "nccl" if device.type == "cuda" else "gloo"
        groups = dist.PrefixStore("groups", _store())
        dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=TIMEOUT)
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


@cache
def _store() -> dist.Store:
    """The key-value store that the launcher named, which all processes reach."""
    store, _, _ = next(dist.rendezvous("env://"))
    return store


@cache
def _board() -> dist.Store:
    """The same store by a connection of its own: while a collective is set up, the other one may be held."""
    return cast(dist.Store, _store().clone())  # type: ignore[attr-defined]  # the stubs lack it


_MEETINGS = count()  # all processes meet in the same order


class Meeting:
    """A point that every process comes to when it likes, bringing a word; made in the same order on each of them.

        with meeting:               # what is raised in here tells the others not to wait for this process
            meeting.come(work())
        words = meeting.wait()

    Once made, any thread may come and wait, while another one computes.
    """

    def __init__(self, what: str, silence_s: float | None = None) -> None:
        """`silence_s` is how long a process may show nothing; SILENCE_S if it is not said."""
        self._what, self._number = what, next(_MEETINGS)
        self._silence_s = SILENCE_S if silence_s is None else silence_s
        self._word = ""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._bring("-")

    def come(self, word: str = "") -> None:
        """Tell the others that this process is done."""
        self._word = word
        self._bring(f"+{word}")

    def _bring(self, word: str) -> None:
        if world().size > 1:
            _board().set(self._key(world().rank), word)

    def wait(self, ranks: Iterable[int] | None = None) -> list[str]:
        """Wait for these processes, or all; returns what they brought.

        Raises:
            TrainingError: a process failed, or has not shown for too long that it gets on.
        """
        if world().size == 1:
            return [self._word]
        wanted = list(range(world().size) if ranks is None else ranks)
        started = said = time.monotonic()
        lives = {rank: (b"", started) for rank in wanted}
        while missing := [rank for rank in wanted if not _board().check([self._key(rank)])]:
            time.sleep(min(0.1, 0.002 + 0.1 * (time.monotonic() - started)))
            now = time.monotonic()
            lives |= {rank: (beat, now) for rank in missing if (beat := _last_beat(rank)) != lives[rank][0]}
            if silent := [rank for rank in missing if now - lives[rank][1] > self._silence_s]:
                raise TrainingError(
                    f"{self._what}: process {silent[0]} of {world().size} has shown no sign of life for "
                    f"{self._silence_s:.0f} s. The last states are kept: look at that process, then run this again."
                )
            if now - said > SAID_EVERY_S:
                said = now
                log.info("%s: waiting for processes %s since %.0f s", self._what, missing, now - started)
        words = [_board().get(self._key(rank)).decode() for rank in wanted]
        if failed := [rank for rank, word in zip(wanted, words, strict=True) if word == "-"]:
            raise TrainingError(f"{self._what}: process {failed[0]} of {world().size} failed; its message is above.")
        return [word.removeprefix("+") for word in words]

    def _key(self, rank: int) -> str:
        return f"meeting/{self._number}/{rank}"


@contextmanager
def showing_life(model: nn.Module) -> Iterator[None]:
    """Show the others with each forward of the model that this process gets on."""
    shown, beats = time.monotonic() - BEAT_EVERY_S, count()

    def show(*_: object) -> None:
        nonlocal shown
        if time.monotonic() - shown >= BEAT_EVERY_S:
            shown = time.monotonic()
            _board().set(f"beat/{world().rank}", f"{next(beats)} {shown}")

    if world().size == 1:
        yield
        return
    hook = model.register_forward_pre_hook(show)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def beating() -> Iterator[None]:
    """Show the others that this process gets on while it waits for something that has a deadline of its own."""
    ended = Event()

    def beat() -> None:
        for n in count():
            _board().set(f"beat/{world().rank}", f"{n} waiting")
            if ended.wait(BEAT_EVERY_S):
                return

    if world().size == 1:
        yield
        return
    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def from_main(what: str, work: Callable[[], list[Made]]) -> list[Made]:
    """What the main process makes, on every process.

    Raises:
        TrainingError: the main process failed, or hangs.
    """
    if world().size == 1:
        return work()
    meeting, made = Meeting(what), list[Made]()
    with meeting, beating():
        if world().is_main:
            made = work()
        meeting.come()
    meeting.wait()
    return gather(made)[0]


def _last_beat(rank: int) -> bytes:
    key = f"beat/{rank}"
    return _board().get(key) if _board().check([key]) else b""


def shared_out(
    what: str, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Made]], model: nn.Module
) -> list[Made]:
    """What `work` makes of the items, in their order, on every process; each works on those that it is dealt.

    Raises:
        TrainingError: another process failed at its part, or hangs.
    """
    rank, size = world().rank, world().size
    if size == 1:
        return list(work(items))
    meeting, own = Meeting(what), items[rank::size]
    with meeting, showing_life(model):
        made = list(work(own)) if own else []
        meeting.come()
    meeting.wait()
    parts = gather(made)
    return [parts[place % size][place // size] for place in range(len(items))]


def gather(own: Made) -> list[Made]:
    """What each process brings, by rank; a collective call."""
    if world().size == 1:
        return [own]
    parts: list[Made] = [own] * world().size
    dist.all_gather_object(parts, own)
    return parts


def gathered_row(row: Row) -> LogRow:
    """The log row of the whole step, from those of all processes; diagnostics are summarised as `<name>/<metric>`."""
    if world().size > 1:
        row = merge_rows(gather(row))
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
