"""Artifacts that a run of the test suite makes once for all of its workers."""

from __future__ import annotations

import fcntl
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that all workers of this run share."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def run_process() -> int:
    """The process that lives as long as this run: pytest itself, which starts the workers."""
    return os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder filled by `make`: the first worker calls it, and the others wait.

    Raises:
        RuntimeError: it failed, here or in another worker; it is not tried again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, failed = folder / "made", folder / "failed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if failed.exists():
            raise RuntimeError(f"{folder.name} could not be made:\n{failed.read_text()}")
        if not done.exists():
            try:
                make(folder)
            except BaseException:
                failed.write_text(traceback.format_exc())
                raise
            done.touch()
    return folder
