"""`.resume`: the saved state of interrupted work, and the locks on it.

    .resume/stage1-3fa9c1.../lock         held by the working process; contains its host, process id and start time
    .resume/stage1-3fa9c1.../can-go-on    the same command resumes from here; nothing has to be fixed first
    .resume/stage1-3fa9c1.../...          saved states, journals of answers, fresh rollouts
    .resume/can-go-on                     a stage of this repository ended with exit code 75

The key in the folder name is a fingerprint of everything that determines the result (infra/provenance.py), so a run
can only find its own state. The lock is a kernel lock (flock), which is released however the process ends. A second
process that needs the same folder waits, and then reuses what the first one left. Work that finishes removes its
folder, or leaves it to a waiting process. Work that ends with an error keeps its folder without the mark. Scripts test
for a mark that is newer than their own start: it survives SIGKILL, and is never there after an error that would recur.
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
BUDGET_VARIABLE, BUDGET_GB = "COORDEXP_RESUME_GB", 200.0  # above it, the oldest unused folders are removed
DAY_S = 86400.0
_GONE = ".gone"
_LEASES = Gate("a description of the process that holds a folder", BusyError, "")


def resume_root() -> Path:
    """`.resume` of the original repository, so that temporary experiment runs share it."""
    return repository_root() / RESUME


def resume_folder(stage: str, key: str) -> Path:
    """The folder in which one piece of work keeps its state."""
    return resume_root() / f"{stage}-{key}"


@dataclass(frozen=True, slots=True)
class Lease:
    """The process that holds a folder, since when, and for what."""

    host: str
    pid: int
    since: str
    what: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.what}, since {self.since})"


@contextmanager
def holding(folder: Path, what: str, *, waits: bool = True) -> Iterator[None]:
    """Hold a folder for this process; without `waits`, fail if another process holds it.

    Raises:
        BusyError: another process holds the folder.
    """
    # True until the block ends well or is interrupted: every other exception removes the mark.
    handle, is_an_error = _acquired(folder, what, waits), True
    try:
        yield
        is_an_error = False
    except (Interrupted, KeyboardInterrupt):
        is_an_error = False
        raise
    finally:
        if is_an_error:
            unmark(folder)  # the same command would fail again
        handle.close()


def _acquired(folder: Path, what: str, waits: bool) -> IO[str]:
    said, waiting = -SAID_EVERY_S, None
    try:
        while True:
            with suppress(FileNotFoundError):  # the holder finished and removed the folder
                folder.parent.mkdir(parents=True, exist_ok=True)
                # Not `exist_ok`: pathlib checks what is there, and fails if the folder was removed in between.
                with suppress(FileExistsError):
                    folder.mkdir()
                handle = (folder / LOCK).open("a+", encoding="utf-8")
                # The lock belongs to the inode, not to the name: the previous holder may have removed the folder
                # between open and flock. Then this lock protects a deleted file, and the loop tries again.
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
                        f"{folder}: in use by {owner or 'another process'}. Expected one process at a time: wait for "
                        "it, or stop it and run this again."
                    )
                # A shared lock on a second file tells the holder (`finish`) not to remove the folder.
                if waiting is None or not _is_at(waiting, folder / WAITING):
                    waiting = (folder / WAITING).open("a")
                    _flock(waiting, fcntl.LOCK_SH)
                if time.monotonic() - said >= SAID_EVERY_S:
                    said = time.monotonic()
                    log.info("waiting for %s, which uses %s", owner or "another process", folder)
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
    """Whether an open file is still the file at this path."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def holder(folder: Path) -> Lease | None:
    """The process that holds a folder; None if it is free or the holder is unknown."""
    try:
        with (folder / LOCK).open("r+", encoding="utf-8") as handle:
            if _flock(handle, fcntl.LOCK_EX):
                return None
        return Lease(**_LEASES.read_object(folder / LOCK))
    except (OSError, BusyError, TypeError):
        return None


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder."""
    try:
        with (folder / LOCK).open("r+") as handle:
            return not _flock(handle, fcntl.LOCK_EX)
    except FileNotFoundError:
        return False


def finish(folder: Path) -> None:
    """Remove a folder that this process holds and whose work is done, unless another process waits for it."""
    # Waiting processes hold a shared lock on this file; if an exclusive one is granted, there are none.
    with suppress(FileNotFoundError), (folder / WAITING).open("r+") as handle:
        if not _flock(handle, fcntl.LOCK_EX):
            return
    _discard(folder)


def _discard(folder: Path) -> None:
    """Remove a folder that other processes may be opening: it is renamed first, so that they create a new one."""
    gone = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}{_GONE}")
    folder.rename(gone)
    remove(gone)


def mark(folder: Path) -> None:
    """Mark a folder: the same command resumes from its content."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()  # safe for several processes at once


def unmark(folder: Path) -> None:
    """Remove the mark: something must be fixed before the command can resume."""
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
        """Whether it contains only the lock and marks."""
        return self.n_bytes == 0

    @property
    def state(self) -> str:
        """The state in words."""
        if self.is_held:
            return f"in use by {self.lease or 'another process'}"
        return "empty" if self.is_empty else "can resume" if self.can_go_on else "stopped by an error, or a cache"


def kept(root: Path) -> list[Kept]:
    """The folders of `.resume`, oldest first."""
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
    except FileNotFoundError:  # its work finished meanwhile
        return None
    is_marked = (folder / MARK).is_file()
    return Kept(folder, n_bytes, time.time() - newest, is_marked, holder(folder), is_held(folder))


def clean(root: Path, older_than_days: float) -> list[Kept]:
    """Remove folders that are not in use and are empty or older than this; returns the removed ones."""
    return [one for one in kept(root) if (one.is_empty or one.age_s > older_than_days * DAY_S) and _removed(one)]


def keep_within_budget(root: Path) -> None:
    """Remove folders that are not in use and cannot resume, oldest first, until the total fits the budget."""
    for half in root.glob(f".*{_GONE}"):  # left by a process that was killed while removing
        shutil.rmtree(half, ignore_errors=True)
    budget = float(os.environ.get(BUDGET_VARIABLE, BUDGET_GB)) * 1e9
    folders = kept(root)
    total = sum(one.n_bytes for one in folders)
    for one in folders:
        if total > budget and not one.can_go_on and _removed(one):
            total -= one.n_bytes
            log.info("removed %s: %s is larger than %.0f GB (%s)", one.folder, root, budget / 1e9, BUDGET_VARIABLE)
    if total > budget:
        log.warning(
            "%s holds %.0f GB, and nothing in it may be removed: `coordexp runs --state` lists it.", root, total / 1e9
        )


def _removed(one: Kept) -> bool:
    """Remove a folder unless a process uses it."""
    try:
        with holding(one.folder, "cleaning up", waits=False):
            _discard(one.folder)
    except BusyError:
        return False
    return True
