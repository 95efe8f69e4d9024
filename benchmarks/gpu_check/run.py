"""Running the sections: in order of importance, independently, until the deadline."""

from __future__ import annotations

import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import FrameType
from typing import TypeVar

import torch
from benchmarks.gpu_check.predictions import Prediction
from benchmarks.gpu_check.results import Result, Setting, Status, append, number

WARM_UPS, ROUNDS = 2, 5
OVERRUN = 2  # times its budget, after which a section is cut on a GPU

Choice = TypeVar("Choice")


class OutOfTime(BaseException):
    """A section was cut. Not an Exception: nothing on the way may take it for a failure of its own."""


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the check: `seconds` it is expected to take on a GPU, and packages beyond those of all sections."""

    name: str
    seconds: float
    run: Callable[[Check], None]
    needs: tuple[str, ...] = ()


class Check:
    """What a section is given: the device, the size of things, and where results go."""

    def __init__(
        self,
        device: torch.device,
        out: Path,
        deadline: float,
        small: bool,
        predictions: Mapping[tuple[str, str], Prediction],
    ) -> None:
        """`deadline` counts seconds from now."""
        self.device = device
        self.out = out
        self.small = small
        self.results: list[Result] = []
        self._predictions = predictions
        self._setting = Setting.here(device)
        self._ends_at = time.monotonic() + deadline
        self._section = ""

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self._ends_at - time.monotonic()

    def pick(self, large: Choice, small: Choice) -> Choice:
        """What is measured on a GPU, or what shows on a CPU that it works."""
        return small if self.small else large

    def add(self, name: str, value: float, unit: str, note: str = "", at_most: float | None = None) -> None:
        """A figure of the section that runs."""
        self._keep(name, "measured", value, unit, note, at_most)

    @contextmanager
    def part(self, name: str, is_ours: bool = True) -> Iterator[None]:
        """A part of a section whose failure does not concern the parts after it; of others' code it is no fault."""
        try:
            yield
        except Exception as error:  # an edge: whatever fails is a result, and what was found before it must not be lost
            traceback.print_exc()
            reason = str(error).strip().splitlines()
            note = f"{type(error).__name__}: {reason[0] if reason else ''}"[:300]
            self._keep(name, "failed" if is_ours else "skipped", note=note)
        reset_memory(self.device)

    def seconds_of(self, run: Callable[[], object], rounds: int = ROUNDS, warm_ups: int = WARM_UPS) -> float:
        """Median seconds of a call by the device's clock, after calls that warm up."""
        if self.small:
            rounds, warm_ups = 1, 1
        for _ in range(warm_ups):
            run()
        found = []
        for _ in range(rounds):
            first = moment(self.device)
            run()
            found.append(seconds_between(first, moment(self.device)))
        return median(found)

    def run(self, sections: Sequence[Section]) -> list[Section]:
        """Run the sections; returns those that a device left unusable, and that another process must run."""
        for place, section in enumerate(sections):
            self._section = section.name
            missing = [package for package in section.needs if find_spec(package) is None]
            if missing:
                self._keep("all", "skipped", note=f"needs {', '.join(missing)}")
            elif self.seconds_left < section.seconds:
                note = f"{max(0.0, self.seconds_left):.0f} s are left, {section.seconds:.0f} s are needed"
                self._keep("all", "skipped", note=note)
            else:
                self._run_one(section)
                if not is_usable(self.device):
                    return list(sections[place + 1 :])
        return []

    def _run_one(self, section: Section) -> None:
        started = time.monotonic()
        limit = self.seconds_left if self.small else min(self.seconds_left, OVERRUN * section.seconds)
        print(f"{section.name}: up to {limit:.0f} s", flush=True)
        try:
            with _at_most(limit), self.part("all"):
                section.run(self)
        except OutOfTime:
            self._keep("all", "failed", note=f"cut after {limit:.0f} s")
            reset_memory(self.device)
        print(f"{section.name}: {time.monotonic() - started:.0f} s", flush=True)

    def _keep(
        self,
        name: str,
        status: Status,
        value: float | None = None,
        unit: str = "",
        note: str = "",
        at_most: float | None = None,
    ) -> None:
        expected = None if self.small else self._predictions.get((self._section, name))
        result = Result(
            section=self._section,
            name=name,
            status=status,
            value=value,
            unit=unit,
            prediction=expected.value if expected else None,
            basis=expected.basis if expected else "",
            at_most=at_most,
            note=note,
            card=self._setting.card,
            versions=self._setting.versions,
            date=self._setting.date,
        )
        self.results.append(result)
        append(self.out, result)
        shown = "" if value is None else f" {number(value)} {unit}"
        print(f"  {name}: {status}{shown} {note}", flush=True, file=sys.stderr if result.is_fault else sys.stdout)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in here when the time is up."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


Moment = float | torch.cuda.Event


def moment(device: torch.device) -> Moment:
    """Now, in the order of the device's work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Moment, last: Moment) -> float:
    """Seconds from one moment to another; waits until the device got there."""
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float)
        assert isinstance(last, float)
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000


def reset_memory(device: torch.device) -> None:
    """Free what is held by nobody, and forget the peak."""
    gc.collect()
    if device.type == "cuda" and is_usable(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int:
    """Most memory that tensors took since the last reset; 0 on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def is_usable(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access it never does again in the same process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
