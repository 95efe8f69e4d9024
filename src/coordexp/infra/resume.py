"""`.resume`: what interrupted work goes on from, and who is at it.

    .resume/stage1-3fa9c1.../lock         held by the process at work, whose host, id and beginning it holds
    .resume/stage1-3fa9c1.../can-go-on    the same command goes on from here, with nothing to be mended before
    .resume/stage1-3fa9c1.../...          saved states, journals of answers, fresh rollouts
    .resume/can-go-on                     a stage of this repository ended with exit code 75

The lock is the kernel's, which lets go of it however the process ends. A second process that wants a folder waits, and
then finds there what the first one left. Work that ends removes its folder, or leaves it to who waits; work that an
error ended keeps its folder without the mark. Scripts ask for a mark that is newer than their own start: it outlives
SIGKILL, and is never there for an error that would come again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from coordexp.errors import BusyError, Interrupted
from coordexp.infra.files import remove, repository_root
from coordexp.infra.foreign import Gate

log = logging.getLogger(__name__)

RESUME, LOCK, WAITING, MARK = ".resume", "lock", "waiting", "can-go-on"
POLL_S, SAID_EVERY_S = 1.0, 60.0
BUDGET_VARIABLE, BUDGET_GB = "COORDEXP_RESUME_GB", 200.0  # of what nobody works in; beyond it the oldest goes
DAY_S = 86400.0
_GONE = ".gone"
_LEASES = Gate("who holds a folder", BusyError, "")


def resume_root() -> Path:
    """`.resume` of the original repository, so that temporary experiment runs share it."""
    return repository_root() / RESUME


def resume_folder(stage: str, key: str) -> Path:
    """Where one piece of work keeps what it goes on from."""
    return resume_root() / f"{stage}-{key}"


@dataclass(frozen=True, slots=True)
class Lease:
    """Who holds a folder, since when, and for what."""

    host: str
    pid: int
    since: str
    what: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.what}, since {self.since})"


@contextmanager
def holding(folder: Path, what: str, *, waits: bool = True) -> Iterator[None]:
    """Hold a folder for this process; without `waits`, only if nobody else does.

    Raises:
        BusyError: another process holds it.
    """
    handle, is_an_error = _acquired(folder, what, waits), True
    try:
        yield
        is_an_error = False
    except (Interrupted, KeyboardInterrupt):
        is_an_error = False
        raise
    finally:
        if is_an_error:
            unmark(folder)  # the same command would meet it again
        handle.close()


def _acquired(folder: Path, what: str, waits: bool) -> IO[str]:
    said, waiting = -SAID_EVERY_S, None
    try:
        while True:
            with suppress(FileNotFoundError):  # its holder finished, and removed it
                folder.mkdir(parents=True, exist_ok=True)
                handle = (folder / LOCK).open("a+", encoding="utf-8")
                if _flock(handle, fcntl.LOCK_EX) and _is_at(handle, folder / LOCK):
                    lease = {"host": platform.node(), "pid": os.getpid(), "since": _now(), "what": what}
                    handle.truncate(0)
                    handle.write(json.dumps(lease))
                    handle.flush()
                    return handle
                owner = holder(folder)
                handle.close()
                if not waits:
                    raise BusyError(
                        f"{folder}: {owner or 'another process'} works in it. One at a time: wait for it, or stop it "
                        "and run this again."
                    )
                if waiting is None or not _is_at(waiting, folder / WAITING):
                    waiting = (folder / WAITING).open("a")
                    _flock(waiting, fcntl.LOCK_SH)
                if time.monotonic() - said >= SAID_EVERY_S:
                    said = time.monotonic()
                    log.info("waiting for %s, which works in %s", owner or "another process", folder)
            time.sleep(POLL_S)
    finally:
        if waiting:
            waiting.close()


def _flock(handle: IO[Any], kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def holder(folder: Path) -> Lease | None:
    """Who holds a folder; None if nobody does, or does not say."""
    try:
        with (folder / LOCK).open("r+", encoding="utf-8") as handle:
            if _flock(handle, fcntl.LOCK_EX):
                return None
        return Lease(**_LEASES.read_object(folder / LOCK))
    except (OSError, BusyError, TypeError):
        return None


def is_held(folder: Path) -> bool:
    """Whether a process works in a folder."""
    try:
        with (folder / LOCK).open("r+") as handle:
            return not _flock(handle, fcntl.LOCK_EX)
    except FileNotFoundError:
        return False


def finish(folder: Path) -> None:
    """Remove a folder that this process holds and whose work is done; for who waits for it, it stays."""
    with suppress(FileNotFoundError), (folder / WAITING).open("r+") as handle:
        if not _flock(handle, fcntl.LOCK_EX):
            return
    _discard(folder)


def _discard(folder: Path) -> None:
    """Remove a folder in which others may just look for its lock: under another name, so that nothing new comes."""
    gone = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}{_GONE}")
    folder.rename(gone)
    remove(gone)


def mark(folder: Path) -> None:
    """Say that the same command goes on from what this folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()  # perhaps by several processes at once


def unmark(folder: Path) -> None:
    """Say that something must be mended first."""
    (folder / MARK).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Kept:
    """One folder of `.resume`."""

    folder: Path
    n_bytes: int
    age_s: float  # since something in it changed
    can_go_on: bool
    lease: Lease | None
    is_held: bool

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but the lock and marks."""
        return self.n_bytes == 0

    @property
    def state(self) -> str:
        """In words."""
        if self.is_held:
            return f"in use by {self.lease or 'another process'}"
        return "empty" if self.is_empty else "can go on" if self.can_go_on else "stopped by an error, or a cache"


def kept(root: Path) -> list[Kept]:
    """What `.resume` holds, the oldest first."""
    folders = [path for path in root.glob("*-*") if path.is_dir() and not path.name.startswith(".")]
    return sorted(filter(None, map(_kept, folders)), key=lambda one: -one.age_s)


def _kept(folder: Path) -> Kept | None:
    n_bytes, newest = 0, 0.0
    try:
        for path in folder.rglob("*"):
            found = path.lstat()
            newest = max(newest, found.st_mtime)
            n_bytes += found.st_size if path.is_file() and path.name not in (LOCK, WAITING, MARK) else 0
        newest = newest or folder.stat().st_mtime
    except FileNotFoundError:  # its work ended meanwhile
        return None
    is_marked = (folder / MARK).is_file()
    return Kept(folder, n_bytes, time.time() - newest, is_marked, holder(folder), is_held(folder))


def clean(root: Path, older_than_days: float) -> list[Kept]:
    """Remove what nobody works in and is empty or that old; returns what went."""
    return [one for one in kept(root) if (one.is_empty or one.age_s > older_than_days * DAY_S) and _removed(one)]


def keep_within_budget(root: Path) -> None:
    """Remove the oldest of what nobody works in and cannot go on, until all of it fits the budget."""
    for half in root.glob(f".*{_GONE}"):  # of a process that was killed there
        shutil.rmtree(half, ignore_errors=True)
    budget = float(os.environ.get(BUDGET_VARIABLE, BUDGET_GB)) * 1e9
    folders = kept(root)
    total = sum(one.n_bytes for one in folders)
    for one in folders:
        if total > budget and not one.can_go_on and _removed(one):
            total -= one.n_bytes
            log.info("%s removed: %s is larger than %.0f GB (%s)", one.folder, root, budget / 1e9, BUDGET_VARIABLE)
    if total > budget:
        log.warning(
            "%s holds %.0f GB, of which nothing may be removed: `coordexp runs --state` lists it.", root, total / 1e9
        )


def _removed(one: Kept) -> bool:
    """Remove a folder unless a process works in it."""
    try:
        with holding(one.folder, "cleaning up", waits=False):
            _discard(one.folder)
    except BusyError:
        return False
    return True
