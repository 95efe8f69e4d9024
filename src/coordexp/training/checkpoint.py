"""Saved states, from which an interrupted training run resumes: the last two, and the position in the log of each.

A state holds everything that a step changes: trained weights, optimizer moments, and the random generators of every
process. Frozen weights come from the checkpoint that the run started from; the state records their hash. The files are
described in training/state_files.py. A state is verified before it is used; if it is damaged, the previous one is used.

Resuming must give the same bytes as an uninterrupted run. Hence the random generators are part of the state, the data
order is a function of the step (training/schedule.py), and the log is truncated to the position that the state records.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from coordexp.errors import CheckpointError, DamagedArtefactError
from coordexp.infra.files import remove, replace_folder
from coordexp.infra.random_streams import stream_seed
from coordexp.infra.resume import mark
from coordexp.training.distributed import Meeting, any_process, gather, world
from coordexp.training.sharding import from_own_rows, held_rows, own_rows
from coordexp.training.state_files import (
    Rows,
    SavedState,
    generation_name,
    generations,
    open_state,
    publish_state,
    write_part,
)

log = logging.getLogger(__name__)

WRITING_S = 3600.0  # longer than any disk needs to write the state of one process
KEPT = 2  # states per run: the newest and one to fall back to
_MOST_PROCESSES = 2**16
Scalars = dict[str, float]


@dataclass(frozen=True, slots=True)
class LogEnd:
    """Size of the log at the time of a state, and the hash of its contents."""

    log_bytes: int
    log_sha256: str


NO_LOG = LogEnd(0, hashlib.sha256().hexdigest())


@dataclass(frozen=True, slots=True)
class ResumeState:
    """A loaded state: the next step to run, and everything that the previous steps changed."""

    saved: SavedState

    @property
    def step(self) -> int:
        """The next step to run."""
        return int(self.saved.facts["step"])

    @property
    def start(self) -> str:
        """The identity of the starting weights, as given to `save_state`; frozen weights come from there."""
        return str(self.saved.facts["start"])

    @property
    def log_end(self) -> LogEnd:
        """The end of the log after the previous steps."""
        return LogEnd(self.saved.facts["log_bytes"], self.saved.facts["log_sha256"])

    @property
    def model(self) -> dict[str, Tensor]:
        """Trained weights by name."""
        return {name: self.saved.read(f"model/{name}") for name in self.saved.names("model")}

    @property
    def optimizer(self) -> dict[str, Any]:
        """Moments and counters by `<weight>/<name>`."""
        moments = {name: self.saved.read(f"optimizer/{name}") for name in self.saved.names("optimizer")}
        return moments | self.saved.facts["scalars"]

    @property
    def torch_rng(self) -> Tensor:
        """The state of the CPU random generator of process 0."""
        return self.saved.read("random/0/cpu")

    def check_start(self, start: str) -> None:
        """Raise CheckpointError unless the run started from these weights."""
        if start != self.start:
            raise CheckpointError(
                f"{self.saved.folder}: the run started from weights with hash {self.start!r}, but the present weights "
                f"have hash {start!r}. Expected the same weights: restore them, or delete {self.saved.folder.parent} "
                "to start at step 0."
            )

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Restore model, optimizer and random generators, each process its own part."""
        self.load_weights(model)
        named = _trained(model)
        parts = [self._state_of(part, named) for part in _parts(optimizer)]
        optimizer.load_state_dict(parts[0] if len(parts) == 1 else {"parts": parts})
        seed_process(self.step)
        _set_generators({name: self.saved.read(f"random/{world().rank}/{name}") for name in self._own_generators()})
        self.saved.close()

    @torch.no_grad()
    def load_weights(self, model: nn.Module) -> None:
        """Load the trained weights; the model must already have the frozen ones.

        Raises:
            CheckpointError: the state belongs to another model, or to one with other trained parameters.
        """
        named, found = _trained(model), set(self.saved.names("model"))
        other = {name for name in found & named.keys() if self.saved.shape(f"model/{name}") != tuple(named[name].shape)}
        if wrong := sorted((found ^ named.keys()) | other):
            raise CheckpointError(
                f"{self.saved.folder}: the state belongs to another model: {len(wrong)} trained weights differ in name "
                f"or shape (first {wrong[0]}). Expected a state of this run; delete {self.saved.folder.parent} to "
                "start at step 0."
            )
        for name, weight in named.items():
            weight.copy_(self._own(f"model/{name}", weight))
        self.saved.close()

    def _state_of(self, optimizer: Optimizer, named: Mapping[str, Tensor]) -> dict[str, Any]:
        """The argument of `load_state_dict` of one optimizer; its groups stay those of the configuration."""
        names = {id(weight): name for name, weight in named.items()}
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        state = {i: entry for i, w in enumerate(weights) if (entry := self._moments(names.get(id(w)), w))}
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}

    def _moments(self, name: str | None, weight: Tensor) -> dict[str, Any]:
        area = f"optimizer/{name}"
        moments: dict[str, Any] = {key: self._own(f"{area}/{key}", weight) for key in self.saved.names(area)}
        scalars = self.saved.facts["scalars"]
        return moments | {key.rpartition("/")[2]: v for key, v in scalars.items() if key.rpartition("/")[0] == name}

    def _own(self, name: str, like: Tensor) -> Tensor:
        """This process's part of a tensor: its own rows if the tensor has the shape of a weight sharded by rows."""
        if isinstance(like, DTensor) and self.saved.shape(name) == tuple(like.shape):
            return from_own_rows(self.saved.read(name, *own_rows(like)), like)
        return self.saved.read(name)

    def _own_generators(self) -> list[str]:
        return self.saved.names(f"random/{world().rank}")


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Everything that steps may change, by name, each tensor once: trainable weights and buffers."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if value.requires_grad or not isinstance(value, nn.Parameter):
            named.setdefault(id(value), (name, value))
    return dict(named.values())


def _parts(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    return getattr(optimizer, "parts", (optimizer,))  # `MuonWithAdamW` has two


def trained_sha256(model: nn.Module) -> str:
    """Hash of the trained weights of an unsharded model; with the starting weights it identifies the whole model."""
    digest = hashlib.sha256()
    for name, value in sorted(_trained(model).items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seed_process(step: int) -> None:
    """Seed this process's generators for a step without saved ones, differently in every process.

    The main process at step 0 keeps the generator state that the seed of the run gave it.
    """
    if index := step * _MOST_PROCESSES + world().rank:
        torch.manual_seed(stream_seed(torch.initial_seed(), "train/process", index))


def generators() -> dict[str, Tensor]:
    """The states of the random generators of this process, by device."""
    cpu = {"cpu": torch.get_rng_state()}
    return cpu | ({"cuda": torch.cuda.get_rng_state().cpu()} if torch.cuda.is_available() else {})


def _set_generators(states: Mapping[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save_state(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, start: str = "") -> None:
    """Save, atomically, the state from which `step` runs next; all processes must call it.

    `start` identifies the checkpoint that provides the frozen weights.

    Raises:
        OSError: the disk is full or not writable; the previous states still exist.
    """
    with StateSaver(folder, start) as saver:
        saver.save(step, model, optimizer, dict(enumerate(gather(generators()))))


class StateSaver:
    """Saves states while training continues: copies at once, writes files in a thread. The next call raises errors."""

    def __init__(self, folder: Path, start: str, resumed: ResumeState | None = None) -> None:
        self._folder, self._start = folder, start
        # Oldest first. States newer than the one resumed from are damaged.
        self._good = [resumed.saved.folder] if resumed else generations(folder)[::-1]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save-state")
        self._writing: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}
        self._cost_s = 0.0
        self._cpu_s = 0.0
        if world().is_main:
            for unfinished in folder.glob(".state-*"):
                remove(unfinished)

    def __enter__(self) -> StateSaver:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    @property
    def cost_s(self) -> float:
        """Training time that the last save cost; on a CPU, including the thread, which competes with the steps."""
        return self._cost_s + (self._cpu_s if world().device.type == "cpu" else 0.0)

    def wait(self) -> None:
        """Return when the state is on disk, or raise the error that prevented it."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def check(self) -> None:
        """Raise the error that prevented writing the last state, if it has occurred by now."""
        if self._writing and self._writing.done():
            self.wait()

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        random: Mapping[int, Mapping[str, Tensor]],
        log_end: LogEnd = NO_LOG,
        *,
        alone: bool = False,
    ) -> None:
        """Copy the state from which `step` runs next, with the generators of each process, and start writing it.

        All processes must call it, except with `alone`: then only the one that holds the whole model.
        """
        started = time.monotonic()
        self.wait()
        tensors, scalars = _contents(model, optimizer)
        tensors |= {f"random/{rank}/{k}": v for rank, states in random.items() for k, v in states.items()}
        held = {name: rows for name, tensor in tensors.items() if (rows := held_rows(tensor))}
        copied = {name: Rows(self._copy(name, rows.values), rows.first, rows.shape) for name, rows in held.items()}
        if any(rows.values.is_cuda for rows in held.values()):
            torch.cuda.synchronize()
        facts = {"step": step, "start": self._start, "scalars": scalars, **asdict(log_end)}
        meetings = () if alone else tuple(Meeting(f"the state of step {step}", WRITING_S) for _ in range(2))
        self._writing = self._thread.submit(self._write, step, copied, facts, meetings)
        self._cost_s = time.monotonic() - started

    def _copy(self, name: str, values: Tensor) -> Tensor:
        """A copy on the CPU, in memory reused for the next state; pinned memory makes copies from a GPU much faster."""
        copy = self._copies.get(name)
        if copy is None or copy.shape != values.shape:
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._copies[name] = copy
        return copy.copy_(values, non_blocking=True)

    def _write(
        self, step: int, held: Mapping[str, Rows], facts: Mapping[str, Any], meetings: tuple[Meeting, ...]
    ) -> None:
        """In the thread: every process writes its part, then the main one writes the hashes while the others wait."""
        cpu_s = time.thread_time()
        temporary = self._folder / f".{generation_name(step)}.tmp"
        try:
            if not meetings:
                self._publish(step, temporary, facts, write_part(temporary, world().rank, held))
            else:
                self._write_together(step, temporary, held, facts, *meetings)
        finally:
            if world().is_main:
                remove(temporary)  # half a state would only take space on a full disk
        self._cpu_s = time.thread_time() - cpu_s

    def _write_together(
        self,
        step: int,
        temporary: Path,
        held: Mapping[str, Rows],
        facts: Mapping[str, Any],
        parts: Meeting,
        hashes: Meeting,
    ) -> None:
        with parts:
            parts.come(json.dumps(write_part(temporary, world().rank, held)))
        every = {name: digest for word in parts.wait() for name, digest in json.loads(word).items()}
        with hashes:
            if world().is_main:
                self._publish(step, temporary, facts, every)
            hashes.come()
        hashes.wait([0])

    def _publish(self, step: int, temporary: Path, facts: Mapping[str, Any], parts: Mapping[str, str]) -> None:
        """Write the hashes, rename the folder, and remove states that are no longer needed."""
        # The rename is the commit point: a folder with this name is complete. Older states go only after that.
        final = self._folder / generation_name(step)
        publish_state(temporary, facts, parts)
        replace_folder(temporary, final)
        mark(self._folder)
        self._good = [*(path for path in self._good if path != final), final][-KEPT:]
        for path in generations(self._folder):
            if path not in self._good:
                remove(path)


def _contents(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], Scalars]:
    """Everything that a step changes, by name: tensors, and the optimizer values that are not tensors."""
    named = _trained(model)
    tensors = {f"model/{name}": value.detach() for name, value in named.items()}
    scalars: Scalars = {}
    for part in _parts(optimizer):
        for name, weight in named.items():
            for key, value in part.state.get(weight, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value
                else:
                    scalars[f"{name}/{key}"] = value
    return tensors, scalars


def load_state(folder: Path, log_path: Path | None = None) -> ResumeState | None:
    """The newest intact state of a run, or None if there are no states. No code from the state is executed.

    All processes must call it: each verifies some of the files, and they agree on one state. With `log_path`, the log
    up to the state is verified too.

    Raises:
        DamagedArtefactError: no state is intact. States are written atomically, so something else changed them.
    """
    damage: list[str] = []
    for path in gather(generations(folder))[0]:
        found = _verified(path, log_path)
        if any_process(isinstance(found, DamagedArtefactError)):
            is_own = isinstance(found, DamagedArtefactError)
            damage.append(str(found) if is_own else f"{path}: damaged, according to another process.")
            continue
        if damage:
            log.warning("%s Resuming from the previous state, %s.", " ".join(damage), path.name)
        assert isinstance(found, ResumeState)
        return found
    if damage:
        raise DamagedArtefactError(
            f"{' '.join(damage)} Expected the state that an interrupted run saved, and no other state is intact; "
            f"delete {folder} to start this stage at step 0."
        )
    return None


def _verified(folder: Path, log_path: Path | None) -> ResumeState | DamagedArtefactError:
    """The state if the files that this process checks are unchanged, otherwise the error."""
    try:
        saved = open_state(folder)
        saved.verify(saved.parts[world().rank :: world().size])
    except DamagedArtefactError as error:
        return error
    state = ResumeState(saved)
    if log_path and world().is_main and log_end(log_path, state.log_end.log_bytes) != state.log_end:
        end = state.log_end.log_bytes
        return DamagedArtefactError(f"{log_path}: its first {end} bytes do not match the hash in {folder.name}.")
    return state


def log_end(path: Path, size: int) -> LogEnd:
    """The end of a log truncated to `size` bytes."""
    content = path.read_bytes()[:size] if path.is_file() else b""
    return LogEnd(len(content), hashlib.sha256(content).hexdigest())
