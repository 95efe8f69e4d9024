"""Live display of a training run: a progress bar on a terminal, and experiment trackers by name.

`COORDEXP_TRACK=dvclive,trackio` in the environment of a stage selects trackers. They do not affect the run or its
outputs. When a run resumes, trackers start anew and receive the log from the first step on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from coordexp.config.paths import TRAIN_LOG
from coordexp.errors import ConfigError, closest
from coordexp.infra import EXPERIMENT_VARIABLE, TRACK_VARIABLE
from coordexp.infra.files import repository_root
from coordexp.infra.logs import read_rows
from coordexp.infra.progress import bar
from coordexp.records.images import read_rgb
from coordexp.training.distributed import LogRow, world
from coordexp.training.eval_callback import PICTURES, EvalCallback
from coordexp.training.loop import Callback, Callbacks

PROJECT = "coordexp"
LOGGED = ("loss/", "coord_diag/", "lr", "grad_norm")
_NOT_MEASURED = {"step", "images", "objects", "seconds"}


class Tracker(Protocol):
    """A program that records numbers and figures by step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the numbers of one step."""
        ...

    def picture(self, name: str, file: Path, step: int) -> None:
        """Record a figure of one step."""
        ...

    def close(self) -> None:
        """End the recording."""
        ...


class DvcLive:
    """Files for VS Code, `dvc plots` and DVC Studio; it does not create a DVC experiment."""

    def __init__(self, folder: Path, name: str) -> None:
        from dvclive import Live

        self._live = Live(str(folder / "dvclive"), save_dvc_exp=False, dvcyaml=None)
        self._summed_up = time.monotonic()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._live.step = step
        for key, value in values.items():
            self._live.log_metric(key, value)
        if time.monotonic() - self._summed_up > 1:  # `sync` is the expensive part of a step
            self._live.sync()
            self._summed_up = time.monotonic()

    def picture(self, name: str, file: Path, step: int) -> None:
        self._live.log_image(f"{name}/{step}{file.suffix}", file)

    def close(self) -> None:
        self._live.end()


class TensorBoard:
    """Event files next to those of earlier runs, whose steps they replace."""

    def __init__(self, folder: Path, name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=0, flush_secs=5)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self._writer.add_image(name, np.asarray(read_rgb(file)), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """W&B, and the base of trackio, which has the same interface."""

    def __init__(self, folder: Path, name: str) -> None:
        self._module = self._imported()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_DIR", str(folder))  # by default it writes into the working directory
        self._run: Any = self._module.init(project=PROJECT, name=name)

    @staticmethod
    def _imported() -> Any:
        import wandb

        return wandb

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self._run.log({name: self._module.Image(str(file))}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(Wandb):
    """A dashboard on this machine: `trackio show`."""

    @staticmethod
    def _imported() -> Any:
        import trackio

        return trackio


TRACKERS: dict[str, Callable[[Path, str], Tracker]] = {
    "dvclive": DvcLive, "tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb,
}  # fmt: skip


def open_trackers(names: Sequence[str], folder: Path, title: str) -> list[Tracker]:
    """Start trackers by name; local files go below `folder`.

    Raises:
        ConfigError: an unknown name, or the package of a tracker is not installed.
    """
    opened: list[Tracker] = []
    for name in names:
        if name not in TRACKERS:
            known = ", ".join(sorted(TRACKERS))
            raise ConfigError(f"unknown tracker {name!r}; expected names among {known}.{closest(name, TRACKERS)}")
        try:
            opened.append(TRACKERS[name](folder, title))
        except ImportError as error:
            raise ConfigError(f"the tracker {name} is not installed ({error}). Run `pip install {name}`.") from error
    return opened


class Tracked(Callback):
    """Passes every step and every evaluation of a run to the trackers."""

    def __init__(self, open_all: Callable[[], Sequence[Tracker]], evals: EvalCallback) -> None:
        """`open_all` starts the trackers when training begins."""
        self._open, self._evals = open_all, evals
        self._trackers: Sequence[Tracker] = ()
        self._evaluated = -1  # the last step whose evaluation was passed on

    def on_train_begin(self, done_steps: int) -> None:
        """Start the trackers and pass on the log of a resumed run."""
        self._trackers = self._open()
        log = self._evals.folder / TRAIN_LOG
        for row in read_rows(log, growing=True) if log.is_file() else ():
            if row["step"] < done_steps:
                self.on_log(row)
        self._give_evaluations()

    def on_log(self, row: LogRow) -> None:
        """Pass on the losses and diagnostics of a step."""
        numbers = {k: v for k, v in row.items() if k.startswith(LOGGED) and isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log({f"train/{key}": value for key, value in numbers.items()}, int(row["step"]))

    def on_step_end(self, done_steps: int) -> None:
        """Pass on the evaluation, if there was one."""
        self._give_evaluations()

    def _give_evaluations(self) -> None:
        for row in self._evals.rows():
            if row["step"] > self._evaluated:
                self._evaluated = row["step"]
                give_evaluation(self._trackers, "eval", row, self._evals.folder)

    def close(self) -> None:
        """End the trackers."""
        for tracker in self._trackers:
            tracker.close()


def give_evaluation(trackers: Sequence[Tracker], name: str, row: Mapping[str, Any], folder: Path) -> None:
    """Pass on the results of the eval callback after a step, and its figure in `folder`."""
    measured = {f"{name}/{k}": v for k, v in row.items() if k not in _NOT_MEASURED and v is not None}
    picture = folder / PICTURES / f"step_{row['step']:06d}.jpg"
    for tracker in trackers:
        tracker.log(measured, row["step"])
        if picture.is_file():
            tracker.picture(name, picture, row["step"])


class Bar(Callback):
    """Updates the progress bar."""

    def __init__(self, at: Callable[[int], None]) -> None:
        self._at = at

    def on_train_begin(self, done_steps: int) -> None:
        """See Callback."""
        self._at(done_steps)

    def on_step_end(self, done_steps: int) -> None:
        """See Callback."""
        self._at(done_steps)


@contextmanager
def shown(evals: EvalCallback, profile: str, stage: str) -> Iterator[Callback]:
    """The eval callback of a stage, in the main process together with progress bar and trackers."""
    if not world().is_main:
        yield evals
        return
    experiment = os.environ.get(EXPERIMENT_VARIABLE) or profile
    names = [name.strip() for name in os.environ.get(TRACK_VARIABLE, "").split(",") if name.strip()]
    folder = repository_root() / "runs" / "live" / experiment / stage
    with bar(stage, evals.steps) as at, ExitStack() as opened:
        callbacks: list[Callback] = [evals, Bar(at)]
        if names:
            tracked = Tracked(lambda: open_trackers(names, folder, f"{experiment}/{stage}"), evals)
            callbacks.append(opened.enter_context(closing(tracked)))
        yield Callbacks(tuple(callbacks))
