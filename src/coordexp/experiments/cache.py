"""Files of a revision straight from DVC's cache: a copy takes a moment where `dvc get` takes seconds of imports.

The lock file says by which hash an output is kept, and a folder's entry in the cache lists its files. Whatever is not
found this way (another place of the cache, an output that git holds, a file only on a remote) is DVC's business.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from coordexp.errors import DataError
from coordexp.infra.foreign import Gate

OBJECTS = Path(".dvc/cache/files/md5")
LISTING = Gate("an entry of DVC's cache", DataError, "dvc pull")


def copy_cached(root: Path, lock: Mapping[str, Mapping[str, Any]], path: str, target: Path) -> bool:
    """Copy an output, or what lies in one, to `target`; False, and nothing there, if the cache does not hold all of it.

    Args:
        root: the repository.
        lock: the stages of a dvc.lock.
        path: as the graph names it.
        target: does not exist.
    """
    files = dict(_cached_files(root, lock, PurePosixPath(path)))
    if not files or not all(file.is_file() for file in files.values()):
        return False
    for name, file in files.items():
        place = target / name if name else target
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)  # not a link: the cache must not change if somebody edits it
    return True


def _cached_files(root: Path, lock: Mapping[str, Mapping[str, Any]], path: PurePosixPath) -> Iterator[tuple[str, Path]]:
    """The cache's files of a path, by their names below it; the empty name for a path that is a file."""
    outs = (out for entry in lock.values() for out in entry.get("outs", []))
    out = next((out for out in outs if path.is_relative_to(out["path"]) and out.get("md5")), None)
    if out is None:
        return
    inner, digest = path.relative_to(out["path"]), str(out["md5"])
    if not digest.endswith(".dir"):
        yield "", _object(root, digest)
    elif _object(root, digest).is_file():
        for item in LISTING.read_json(_object(root, digest)):
            name = PurePosixPath(item["relpath"])
            if name.is_relative_to(inner) and ".." not in name.parts:
                below = name.relative_to(inner).as_posix()
                yield ("" if below == "." else below), _object(root, str(item["md5"]))


def _object(root: Path, digest: str) -> Path:
    return root / OBJECTS / digest[:2] / digest[2:]
