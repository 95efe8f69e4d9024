"""Counts file operations, and makes one of them fail or kills the process there.

This covers reads, writes, fsyncs and renames of files below one folder that go through Python: its own file objects,
`os`, and the writers of safetensors and pyarrow, which are redirected through such objects. Native reads and writes of
libraries (the tokenizer's file, memory maps) are neither counted nor affected. Of a file that is read in many pieces,
the pieces 1, 2, 4, 8, ... are counted.

`install` changes the interpreter permanently: only a process that is created for one run may call it.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

KINDS = ("write", "fsync", "rename", "read")
SOURCES = ("src", "pipelines")  # folders that all stages read in the same way
# The faults: a full disk stays full, a bad block fails once. Signals come before the operation.
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}
LASTING = {"ENOSPC"}
FAULTS = {
    "write": ("ENOSPC", "SIGKILL", "SIGINT"),
    "fsync": ("EIO", "SIGKILL"),
    "rename": ("EIO", "SIGKILL", "SIGTERM"),
    "read": ("EIO",),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """The `number`-th operation of a kind, counted from 1, and the fault there."""

    kind: str
    number: int
    what: str


@dataclass(slots=True)
class Shim:
    """Counts the operations on files below `root`; `fired` is told the file when the fault, if any, is met first."""

    root: str
    fault: Fault | None = None
    fired: Callable[[str], object] = lambda _: None
    places: list[tuple[str, str]] = field(default_factory=list)  # kind and path below the root, in order
    _counts: Counter[str] = field(default_factory=Counter)
    _lock: Any = field(default_factory=threading.Lock)
    _process: int = field(default_factory=os.getpid)

    def holds(self, path: str) -> bool:
        """Whether a path is below the root, but not one of the sources, which all stages read in the same way."""
        top = os.path.relpath(path, self.root).partition(os.sep)[0] if path else ".."
        return top not in ("..", *SOURCES)

    def meet(self, kind: str, path: str) -> None:
        """Count an operation, and trigger the fault if it is the chosen one."""
        if os.getpid() != self._process:  # a process that the stage started: not the one that is tried
            return
        with self._lock:
            self._counts[kind] += 1
            number = self._counts[kind]
            self.places.append((kind, shown := os.path.relpath(path, self.root)))
        fault = self.fault
        if fault is None or fault.kind != kind or number < fault.number:
            return
        if number == fault.number:
            self.fired(shown)
        elif fault.what not in LASTING:
            return
        if fault.what in SIGNALS:
            os.kill(self._process, SIGNALS[fault.what])
        else:
            number = ERRORS[fault.what]
            raise OSError(number, os.strerror(number), *([path] if kind == "rename" else []))  # others know no name

    def install(self) -> None:
        """Redirect the file operations of this interpreter."""
        self._files()
        self._system()
        self._libraries()

    def _files(self) -> None:
        shim, plain, file_type = self, io.open, _file_type(self)

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
            newline: Any = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if not shim.holds(_path(file)):
                return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = file_type(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            size = io.DEFAULT_BUFFER_SIZE if buffering in (-1, 1) else buffering
            both, writes = "+" in mode, any(letter in mode for letter in "wax")
            binary = io.BufferedRandom if both else io.BufferedWriter if writes else io.BufferedReader
            found = binary(raw, size)
            if "b" in mode:
                return found
            text = io.TextIOWrapper(found, encoding, errors, newline, line_buffering=buffering == 1)  # type: ignore[arg-type]
            text.mode = mode  # type: ignore[misc]
            return text

        io.open = builtins.open = opened  # type: ignore[assignment]

    def _system(self) -> None:
        fsync, write, renames = os.fsync, os.write, {"rename": os.rename, "replace": os.replace}

        def flushed(handle: Any) -> None:
            if self.holds(path := _path(handle if isinstance(handle, int) else handle.fileno())):
                self.meet("fsync", path)
            fsync(handle)

        def written(handle: int, data: Any) -> int:
            if self.holds(path := _path(handle)):
                self.meet("write", path)
            return write(handle, data)

        def renamed(how: str) -> Callable[..., None]:
            def rename(source: Any, target: Any, **more: Any) -> None:
                if self.holds(_path(target)):
                    self.meet("rename", _path(target))
                renames[how](source, target, **more)

            return rename

        os.fsync, os.write = flushed, written
        os.rename, os.replace = renamed("rename"), renamed("replace")

    def _libraries(self) -> None:
        """Redirect the writers of libraries, with the errors that they would raise."""
        import pyarrow.parquet.core as parquet
        import safetensors.torch
        from safetensors import SafetensorError, serialize

        def serialized(tensors: Any, path: Any, metadata: Any = None) -> None:
            try:
                with builtins.open(path, "wb") as out:
                    out.write(serialize(tensors, metadata))
            except OSError as error:
                raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from error

        prepared = parquet.ParquetWriter.__init__

        def begun(writer: Any, where: Any, *arguments: Any, **named: Any) -> None:
            sink = builtins.open(where, "wb") if isinstance(where, str | os.PathLike) else where  # noqa: SIM115
            prepared(writer, sink, *arguments, **named)
            writer.file_handle = sink  # which it closes

        safetensors.torch.serialize_file = serialized
        parquet.ParquetWriter.__init__ = begun


def _file_type(shim: Shim) -> type[io.FileIO]:
    """A file whose reads and writes are counted."""

    class File(io.FileIO):
        n_reads = 0

        def _meet_read(self) -> None:
            self.n_reads += 1
            if self.n_reads & (self.n_reads - 1) == 0:
                shim.meet("read", _path(self.name))

        def write(self, data: Any) -> int:
            try:
                shim.meet("write", _path(self.name))
            except OSError:
                super().write(bytes(data)[: len(bytes(data)) // 2])  # as a disk that gets full
                raise
            return super().write(data)

        def readinto(self, buffer: Any) -> int | None:
            self._meet_read()
            return super().readinto(buffer)

        def readall(self) -> bytes:
            self._meet_read()
            return super().readall()

    return File


def _path(file: Any) -> str:
    """Of a path, or of what a file descriptor is open for."""
    if not isinstance(file, int):
        return os.fspath(file) if not isinstance(file, bytes) else os.fsdecode(file)
    try:
        found = os.readlink(f"/proc/self/fd/{file}")
    except OSError:
        return ""
    return found if found.startswith(os.sep) else ""  # pipe:[1], socket:[1]
