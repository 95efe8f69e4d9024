"""Writing so that no half file is ever read: a temporary name in the same folder, fsync of file and folder, rename."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors words one


def repository_root() -> Path:
    """The repository that the user works in: a stage may run in a temporary copy of it (`dvc exp run --temp`)."""
    return Path(os.environ.get("DVC_ROOT", "."))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes `path` when the block ends, and is removed if the block fails.

    A file that DVC linked from its cache is replaced, never written through. Parents are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():  # said of `path` now, not of the temporary name later
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small binary file, a picture for one, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def lacking_room(path: Path, n_bytes: int) -> OSError | None:
    """The error that writing so many bytes to `path` would end in, as far as the disk says how much is free."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free >= n_bytes:
        return None
    room = f"{os.strerror(errno.ENOSPC)} ({n_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free)"
    return OSError(errno.ENOSPC, room, str(path))


def os_error(error: Exception, path: Path) -> Exception:
    """What safetensors says of a full or unwritable disk, as an OSError; any other error of its as it is."""
    number = _OS_ERROR.search(str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk: a rename may survive a power cut that its data do not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder into its place; what was there is removed only when the new one stands there."""
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    old = final.with_name(f".{final.name}.old")
    remove(old)
    if os.path.lexists(final):
        final.replace(old)
    temporary.replace(final)
    sync(final.parent)
    remove(old)
