"""One training run in several processes: each runs its slice of a step's rows, then the gradients are summed.

Every loss is divided by the counts of the whole step (`step.step_counts`), which each process knows from the plan. The
sum of the gradients therefore equals the gradient of one process on all rows, weighted by tokens rather than by
processes, however unequal the slices are. Each process holds all weights and the optimizer state, or its shard of them
with `launch.sharding: fsdp2` (training/sharding.py). Only process 0 writes.

torchrun, or `launch` in coordexp.training.launch, starts the processes and sets their ranks.

Collectives are used for steps, whose parts take about equal time in all processes. Work of unequal length
(`shared_out`: answers, fresh rollouts) ends in a `Meeting` at the key-value store of the processes. A waiting process
sees there whether the others are still making progress, and logs which ones it waits for. A collective would wait
silently, and NCCL would abort after its timeout even if the wait is legitimate.
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
from coordexp.infra.signals import ended_by_signals
from coordexp.losses.coord_terms import CoordDiagnostics

log = logging.getLogger(__name__)

# A process that dies closes its connections, which ends the others at once. The timeout is for one that hangs.
TIMEOUT = timedelta(minutes=20)
BEAT_EVERY_S = 5.0  # minimum interval between heartbeats of a working process
SILENCE_S = 300.0  # without a heartbeat for this long, a process counts as hanging
SAID_EVERY_S = 60.0  # interval of the log line of a waiting process
BUCKET_NUMBERS = 2**26  # gradients are summed in buckets of this many numbers: 256 MiB of float32
_SUMMED = ("tokens", "samples", "time/wait_s")
_SUMMED_AREAS = ("loss/", "raw/")

Made = TypeVar("Made")
Item = TypeVar("Item")
COMPUTE = "compute_in_forward"  # method of a sharded model: gathers the weights like `forward`, then calls its argument

Logged = float | str | CoordDiagnostics  # a number, the letter of the channel, or diagnostics as additive sums
Row = dict[str, Logged]  # for a part of a step
LogRow = dict[str, float | str]  # for a whole step


@dataclass(frozen=True, slots=True)
class World:
    """The rank of this process, the number of processes, and the device of its model."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0


@cache
def world() -> World:
    """Join the other processes, if a launcher started several; every call returns the same object."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device()
    if size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        with ended_by_signals():  # if one process dies before it has joined, the launcher stops the others
            groups = dist.PrefixStore("groups", _store())
            dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=TIMEOUT)
    if rank > 0:
        logging.getLogger("coordexp").setLevel(logging.WARNING)
    return World(rank, size, device)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only its rows of the weights."""
    return isinstance(model, FSDPModule)


def in_forward(model: nn.Module, compute: Callable[[], Made]) -> Made:
    """Call `compute` while the model's weights are gathered; they stay gathered until its losses were back-propagated.

    Everything that reads weights, including the head, belongs in `compute`. Its result may hold losses in dataclasses.
    """
    return cast(Made, getattr(model, COMPUTE)(compute)) if is_sharded(model) else compute()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in place; a missing gradient counts as zero."""
    if world().size == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # a collective needs the same tensors in the same order from every process
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
    """True on every process if it is true on any, because a signal may reach only some of them."""
    if world().size == 1:
        return flag
    votes = torch.tensor(float(flag), device=world().device)
    dist.all_reduce(votes)
    return bool(votes > 0)


@cache
def _store() -> dist.Store:
    """The launcher's key-value store, which all processes can reach."""
    store, _, _ = next(dist.rendezvous("env://"))
    return store


@cache
def _board() -> dist.Store:
    """The same store over a second connection: setting up a collective may block the first."""
    return cast(dist.Store, _store().clone())  # type: ignore[attr-defined]  # the stubs lack it


_MEETINGS = count()  # equal numbers denote the same meeting, as all processes create them in the same order


class Meeting:
    """A barrier to which every process brings a string, each in its own time.

        with meeting:               # an exception in here tells the others not to wait for this process
            meeting.come(work())
        words = meeting.wait()

    All processes must create their meetings in the same order. After that, any thread may call `come` and `wait` while
    another one computes.
    """

    def __init__(self, what: str, silence_s: float | None = None) -> None:
        """`silence_s` is the longest time without a heartbeat; the default is SILENCE_S."""
        self._what, self._number = what, next(_MEETINGS)
        self._silence_s = SILENCE_S if silence_s is None else silence_s
        self._word = ""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._bring("-")

    def come(self, word: str = "") -> None:
        """Tell the other processes that this one is done."""
        self._word = word
        self._bring(f"+{word}")

    def _bring(self, word: str) -> None:
        if world().size > 1:
            _board().set(self._key(world().rank), word)

    def wait(self, ranks: Iterable[int] | None = None) -> list[str]:
        """Wait for these processes (default: all); returns their strings.

        Raises:
            TrainingError: a process failed, or sent no heartbeat for too long.
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
                    f"{self._what}: process {silent[0]} of {world().size} has sent no heartbeat for "
                    f"{self._silence_s:.0f} s. The saved states are kept: check that process, then run the same "
                    "command again."
                )
            if now - said > SAID_EVERY_S:
                said = now
                log.info("%s: waiting for processes %s for %.0f s", self._what, missing, now - started)
        words = [_board().get(self._key(rank)).decode() for rank in wanted]
        if failed := [rank for rank, word in zip(wanted, words, strict=True) if word == "-"]:
            raise TrainingError(f"{self._what}: process {failed[0]} of {world().size} failed; its message is above.")
        return [word.removeprefix("+") for word in words]

    def _key(self, rank: int) -> str:
        return f"meeting/{self._number}/{rank}"


@contextmanager
def showing_life(model: nn.Module) -> Iterator[None]:
    """Send a heartbeat with each forward of the model, at most every BEAT_EVERY_S."""
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
    """Send heartbeats while this process waits for something that has its own deadline."""
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
    """The result of `work` in the main process, on every process.

    Raises:
        TrainingError: the main process failed or hangs.
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
    """Apply `work` to the items, divided among the processes; returns all results, in order, on every process.

    Raises:
        TrainingError: another process failed or hangs.
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
    """The values of all processes, by rank; a collective call."""
    if world().size == 1:
        return [own]
    parts: list[Made] = [own] * world().size
    dist.all_gather_object(parts, own)
    return parts


def gathered_row(row: Row) -> LogRow:
    """The log row of the whole step from those of all processes; diagnostics are summarized as `<name>/<metric>`."""
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
    """Merge the rows of parts of one step: losses, counts and diagnostics add up; the rest is equal in all parts."""
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
