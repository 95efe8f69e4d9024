"""Stored artifacts that carry the sha256 of what was written: folders with a list of hashes, and single JSON objects.

    runs/tiny/rollout/rollouts.jsonl
    runs/tiny/rollout/coordexp.sha256    written last: one line per file, in the format of `sha256sum --check`

Every reader of a file in such a folder first compares its hash (`verified`), once per process. A bit that flipped on
disk or in a copy therefore becomes an error that names the file, never a different number. A folder without the list
is foreign, or its stage has not finished: there is nothing to compare with. A JSON object outside such a folder carries
its hash inside (`sealed_row`): journal lines, for which no list can be kept current, and outputs of a single file.
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
SEAL = "coordexp_sha256"  # key whose value is the hash of all other keys of the object
RESTORE = "Restore it with `coordexp verify --repair`, or run the stage that writes it again"
_LINE = re.compile(r"^([0-9a-f]{64})  ([^\n]+)\n", re.MULTILINE)
# A file changed more recently than this may change again without a new timestamp (FAT has a resolution of 2 s), so its
# hash is not cached. Git calls such index entries "racily clean".
_SETTLED_S = 2.0
_Version = tuple[int, ...]  # the part of a file's status that changes with its content

_digests: dict[str, tuple[_Version, str]] = {}
_lists: dict[str, tuple[_Version, HashList]] = {}


def file_sha256(path: Path) -> str:
    """The sha256 of a file as 64 hex digits; computed once per process while the file does not change."""
    version, known = _version(path), _digests.get(str(path))
    if known and known[0] == version:
        return known[1]
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if version:
        _digests[str(path)] = version, digest
    return digest


def _version(path: Path) -> _Version:
    """A key that stays equal while the file does not change; empty if it changed too recently to tell."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # reading a pipe may never end
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if time.time() - max(found.st_mtime, found.st_ctime) < _SETTLED_S:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True, slots=True)
class HashList:
    """The sha256 of every file in a folder and its subfolders, by relative path."""

    folder: Path
    digests: Mapping[str, str]

    def text(self) -> str:
        """The file's content: one line per file, then the hash of these lines in a comment, so that none can vanish."""
        lines = "".join(f"{self.digests[name]}  {name}\n" for name in sorted(self.digests))
        return f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()} of the lines above\n"

    def check(self, name: str) -> None:
        """Raise DamagedArtefactError if the file differs from what was written, is missing, or was added."""
        path, hashes, expected = self.folder / name, self.folder / HASHES, self.digests.get(name)
        try:
            found = f"sha256 {file_sha256(path)}"
        except FileNotFoundError:
            found = ""
        except OSError as error:
            found = f"cannot be read ({error.strerror})"
        if expected is None and found:
            raise DamagedArtefactError(
                f"{path}: not in the list {hashes}. Expected the folder exactly as its stage wrote it: remove the "
                f"file, or delete {hashes} if you made the change."
            )
        if expected is not None and found != f"sha256 {expected}":
            raise DamagedArtefactError(
                f"{path}: {found[:23] or 'no such file'}, but {HASHES} records {expected[:16]}: damaged, or changed "
                f"after its stage wrote it. {RESTORE}; delete {hashes} if you made the change."
            )


def read_hashes(folder: Path) -> HashList | None:
    """The list of a folder; None if there is none.

    Raises:
        DamagedArtefactError: the list differs from what was written.
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
    """Yield every difference between a folder and its list, in words."""
    try:
        hashes = read_hashes(folder)
    except DamagedArtefactError as error:
        yield str(error)
        return
    if hashes is None:
        yield f"{folder}: has no {HASHES}, which is written last; its stage did not finish."
        return
    for name in hashes.digests:
        try:
            hashes.check(name)
        except DamagedArtefactError as error:
            yield str(error)


def write_hashes(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the list of a folder whose files are complete; later damage is detected from now on."""
    write_text(folder / HASHES, HashList(folder, digests).text())


@contextmanager
def sealing(folder: Path) -> Iterator[Path]:
    """A folder to write files into. Its list is removed first, and written again when the block ends without an error.

    An interrupted block therefore leaves a folder without a list, which is never mistaken for a finished one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HASHES).unlink(missing_ok=True)
    yield folder
    # Hash the files as they are read back, not the data that were meant to be written.
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != HASHES]
    write_hashes(folder, {path.relative_to(folder).as_posix(): file_sha256(path) for path in files})


def let_go(path: Path) -> None:
    """Remove a file on purpose, also from the list of its folder."""
    hashes = read_hashes(path.parent)
    path.unlink(missing_ok=True)
    if hashes and path.name in hashes.digests:
        write_hashes(path.parent, {name: digest for name, digest in hashes.digests.items() if name != path.name})


def verified(path: Path) -> Path:
    """Check a file against the list in its folder or in the folder above, if there is one; returns the path.

    Raises:
        DamagedArtefactError: the file differs from what was written, or is missing.
    """
    if found := _list_of(path.parent):
        hashes, place = found
        hashes.check(place + path.name)
    return path


def verify_files(folder: Path, is_read: Callable[[str], bool]) -> dict[str, str]:
    """Verify the files of a folder whose names satisfy `is_read`; returns their recorded sha256.

    Files of its subfolders are left alone: a training keeps checkpoints there, each as large as the one that is read.

    Raises:
        DamagedArtefactError: one differs from what was written, was added, or is missing.
    """
    if not (found := _list_of(folder)):
        return {}
    hashes, place = found
    listed = {name.removeprefix(place) for name in hashes.digests if name.startswith(place)}
    names = sorted(name for name in listed | set(os.listdir(folder)) if "/" not in name and is_read(name))
    for name in names:
        hashes.check(place + name)
    return {name: hashes.digests[place + name] for name in names}


def _list_of(folder: Path) -> tuple[HashList, str] | None:
    """The list that covers a folder (its own or its parent's), and the prefix of the folder's names in it."""
    if hashes := read_hashes(folder):
        return hashes, ""
    place = f"{folder.name}/"
    above = read_hashes(folder.parent) if folder.name else None
    return (above, place) if above and any(name.startswith(place) for name in above.digests) else None


def sealed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object together with the hash of its content."""
    return {**row, SEAL: _row_sha256(row)}


def unsealed_row(row: Any) -> dict[str, Any]:
    """The inverse of `sealed_row`; raises ValueError if the hash is missing or does not fit."""
    if not isinstance(row, dict) or SEAL not in row:
        raise ValueError(f"not an object with the key {SEAL}")
    content = {key: value for key, value in row.items() if key != SEAL}
    if row[SEAL] != _row_sha256(content):
        raise ValueError(f"the content does not match its {SEAL}")
    return content


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its hash, atomically."""
    write_text(path, json.dumps(sealed_row(value), indent=2, ensure_ascii=False) + "\n")


def _row_sha256(row: Mapping[str, Any]) -> str:
    # A canonical form, so that the hash does not depend on key order or white space in the file.
    return hashlib.sha256(json.dumps(row, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
