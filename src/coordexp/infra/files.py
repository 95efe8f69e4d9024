"""Atomic writes, so that no partial file is ever read: write a temporary file in the same folder, fsync it, rename it.

The order matters. rename(2) replaces a file atomically, but a journaling file system may commit the rename before the
data of the new file. After a power failure the name would then refer to an empty or partial file. So the data are
flushed first (`sync` of the file), then the file is renamed, then the folder is flushed, which makes the new name
durable. Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), show how often applications fail at this.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in messages of safetensors, which is written in Rust


def repository_root() -> Path:
    """The repository of the user; a stage may run in a temporary copy of it (`dvc exp run --temp`)."""
    return Path(os.environ.get("DVC_ROOT", "."))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` when the block succeeds, and is removed when the block fails.

    If `path` is a hard link or symbolic link into DVC's cache, the link is replaced and the cache stays intact. Parent
    folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():  # fail now and name `path`, not later with the temporary name
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # In the same folder: rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small binary file, such as an image, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def lacking_room(path: Path, n_bytes: int) -> OSError | None:
    """The error that writing this many bytes to `path` would raise, given the free disk space; None if it fits."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free >= n_bytes:
        return None
    room = f"{os.strerror(errno.ENOSPC)} ({n_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free)"
    return OSError(errno.ENOSPC, room, str(path))


def os_error(error: Exception, path: Path) -> Exception:
    """Turn a safetensors error about a full or read-only disk into an OSError; return other errors unchanged."""
    number = _OS_ERROR.search(str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a finished folder to its final name; the old folder is removed only after the new one is in place."""
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    # rename(2) cannot replace a folder that is not empty. The old one is moved aside first: a crash between the two
    # renames leaves both complete folders on disk, under temporary names.
    old = final.with_name(f".{final.name}.old")
    remove(old)
    if os.path.lexists(final):
        final.replace(old)
    temporary.replace(final)
    sync(final.parent)
    remove(old)
