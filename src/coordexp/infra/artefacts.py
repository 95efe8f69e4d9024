"""What is stored and read again: folders and lines of JSON that carry the sha256 of what was written.

    runs/tiny/rollout/rollouts.jsonl
    runs/tiny/rollout/coordexp.sha256    written last: a line for each file, as `sha256sum --check` reads it

Whoever reads a file of such a folder compares it first (`verified`), once in a process, so that a bit that changed on
a disk or in a copy is an error with a name and never another number. A folder without that list is not ours, or its
stage has not finished: there is nothing to compare with. A value that stands alone carries its hash itself
(`sealed_row`): the lines of journals, to which no list could be kept, and outputs of one file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.errors import DamagedArtefactError
from coordexp.infra.files import write_text

HASHES = "coordexp.sha256"
SEAL = "coordexp_sha256"  # key of an object that holds the hash of all its others
RESTORE = "Restore it by `coordexp verify --repair`, or run the stage that writes it again"
_LINE = re.compile(r"^([0-9a-f]{64})  ([^\n]+)\n", re.MULTILINE)
_SETTLED_S = 2.0  # a file that changed later than that may change again within one tick of its time stamp
_Version = tuple[int, ...]  # what of a file's status changes with its content

_digests: dict[str, tuple[_Version, str]] = {}
_lists: dict[str, tuple[_Version, HashList]] = {}


def file_sha256(path: Path) -> str:
    """The sha256 of a file, 64 hex digits; computed once in a process as long as the file does not change."""
    version, known = _version(path), _digests.get(str(path))
    if known and known[0] == version:
        return known[1]
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if version:
        _digests[str(path)] = version, digest
    return digest


def _version(path: Path) -> _Version:
    """Equal for a file that did not change; empty for one that changed just now."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # reading a pipe may never end
        raise OSError(errno.EINVAL, "no regular file", str(path))
    if time.time() - max(found.st_mtime, found.st_ctime) < _SETTLED_S:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True, slots=True)
class HashList:
    """The files of a folder and of those below it, by their paths from there, with the sha256 of each."""

    folder: Path
    digests: Mapping[str, str]

    def text(self) -> str:
        """What is written: a line for each file, and as a comment the hash of these lines, so that none can go."""
        lines = "".join(f"{self.digests[name]}  {name}\n" for name in sorted(self.digests))
        return f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()} of the lines above\n"

    def check(self, name: str) -> None:
        """Raise DamagedArtefactError unless the file is the one that was written, or neither written nor there."""
        path, hashes, expected = self.folder / name, self.folder / HASHES, self.digests.get(name)
        try:
            found = f"sha256 {file_sha256(path)}"
        except FileNotFoundError:
            found = ""
        except OSError as error:
            found = f"cannot be read ({error.strerror})"
        if expected is None and found:
            raise DamagedArtefactError(
                f"{path}: not one of the files that {hashes} lists. Expected the folder as its stage wrote it: remove "
                f"the file, or delete {hashes} if the change is yours."
            )
        if expected is not None and found != f"sha256 {expected}":
            raise DamagedArtefactError(
                f"{path}: {found[:23] or 'no such file'}, but {HASHES} records {expected[:16]}: damaged, or changed "
                f"after its stage wrote it. {RESTORE}; delete {hashes} if the change is yours."
            )


def read_hashes(folder: Path) -> HashList | None:
    """The list of a folder; None if it has none.

    Raises:
        DamagedArtefactError: it is not what was written.
    """
    path = folder / HASHES
    try:
        version, known = _version(path), _lists.get(str(path))
        if known and known[0] == version:
            return known[1]
        text = path.read_bytes().decode("utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedArtefactError(f"{path}: cannot be read ({error.strerror}). {RESTORE}.") from error
    rows = _LINE.findall(text)
    hashes = HashList(folder, {name: digest for digest, name in rows})
    if text != hashes.text():
        raise DamagedArtefactError(f"{path}: not the list of hashes that was written. {RESTORE}.")
    if version:
        _lists[str(path)] = version, hashes
    return hashes


def damage(folder: Path) -> Iterator[str]:
    """What is wrong with a folder, or with each of its files, that should be as it was written."""
    try:
        hashes = read_hashes(folder)
    except DamagedArtefactError as error:
        yield str(error)
        return
    if hashes is None:
        yield f"{folder}: has no {HASHES}, which is written last."
        return
    for name in hashes.digests:
        try:
            hashes.check(name)
        except DamagedArtefactError as error:
            yield str(error)


def write_hashes(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the list of a folder whose files are all there; what is damaged later is noticed from now on."""
    write_text(folder / HASHES, HashList(folder, digests).text())


@contextmanager
def sealing(folder: Path) -> Iterator[Path]:
    """A folder to write files into; the list goes first, and is written when the block ends without an error."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HASHES).unlink(missing_ok=True)
    yield folder
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != HASHES]
    write_hashes(folder, {path.relative_to(folder).as_posix(): file_sha256(path) for path in files})


def verified(path: Path) -> Path:
    """The same path, of a file that is the one that was written, as far as a list beside or above it says so.

    Raises:
        DamagedArtefactError: it is another one, or gone.
    """
    if found := _list_of(path.parent):
        hashes, place = found
        hashes.check(place + path.name)
    return path


def verify_files(folder: Path, is_read: Callable[[str], bool]) -> dict[str, str]:
    """Verify those files of a folder that are read, by name; returns the sha256 that are recorded for them.

    Raises:
        DamagedArtefactError: one is another than was written, was added, or is gone.
    """
    if not (found := _list_of(folder)):
        return {}
    hashes, place = found
    listed = {name.removeprefix(place) for name in hashes.digests if name.startswith(place)}
    names = sorted(name for name in listed | set(os.listdir(folder)) if is_read(name))
    for name in names:
        hashes.check(place + name)
    return {name: hashes.digests[place + name] for name in names}


def _list_of(folder: Path) -> tuple[HashList, str] | None:
    """The list of a folder, its own or that of the folder above, and how names begin there."""
    if hashes := read_hashes(folder):
        return hashes, ""
    place = f"{folder.name}/"
    above = read_hashes(folder.parent) if folder.name else None
    return (above, place) if above and any(name.startswith(place) for name in above.digests) else None


def sealed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of its content in it."""
    return {**row, SEAL: _row_sha256(row)}


def unsealed_row(row: Any) -> dict[str, Any]:
    """What `sealed_row` was given; raises ValueError for a value that it did not make."""
    if not isinstance(row, dict) or SEAL not in row:
        raise ValueError(f"it is no object with its {SEAL}")
    content = {key: value for key, value in row.items() if key != SEAL}
    if row[SEAL] != _row_sha256(content):
        raise ValueError(f"its content does not have the {SEAL} that it records")
    return content


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object that stands alone, whole or not at all."""
    write_text(path, json.dumps(sealed_row(value), indent=2, ensure_ascii=False) + "\n")


def _row_sha256(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
