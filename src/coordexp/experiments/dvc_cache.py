"""DVC's cache on this machine, verified by md5. DVC itself does not check files again after it has linked them."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordexp.errors import ConfigError, DamagedArtefactError
from coordexp.infra.files import replacing
from coordexp.infra.foreign import Gate

Run = Callable[..., "subprocess.CompletedProcess[str]"]  # a program with its arguments, in the repository
_folders: dict[Path, Path] = {}  # by repository, because `dvc cache dir` takes a second
_LISTS = Gate("a list of files in DVC's cache", DamagedArtefactError, "Run the stage that wrote it again.", 1 << 30)
_ENTRY = re.compile(r"[0-9a-f]{30}(\.dir)?")


@dataclass(slots=True)
class DvcCache:
    """DVC's cache on this machine; the md5 of its content names an entry."""

    folder: Path
    _md5: dict[tuple[int, ...], str] = field(default_factory=dict, repr=False)  # by inode and time, shared by links

    @classmethod
    def of(cls, root: Path, run: Run) -> DvcCache:
        """The cache of a repository, in which `run` runs programs; raises ConfigError outside a DVC repository."""
        if (place := root.resolve()) not in _folders:
            done = run("dvc", "cache", "dir")
            if done.returncode:
                raise ConfigError(f"{place}: not a DVC repository. Run this where dvc.yaml is.\n{done.stderr}")
            _folders[place] = place / done.stdout.strip() / "files" / "md5"
        return cls(_folders[place])

    def entry(self, md5: str) -> Path:
        """The path of the content with this md5, which may not exist."""
        return self.folder / md5[:2] / md5[2:]

    def holds(self, md5: str) -> bool:
        """Whether a content exists and is intact."""
        path = self.entry(md5)
        return path.is_file() and self.md5_of(path) == md5.removesuffix(".dir")

    def entries(self) -> Iterator[Path]:
        """The paths of all entries."""
        for path in sorted(self.folder.glob("??/*")):
            if _ENTRY.fullmatch(path.name):
                yield path

    def md5_of(self, path: Path) -> str:
        """The md5 of a file; a file with several links is read once."""
        found = path.stat()
        key = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        if key not in self._md5:
            with path.open("rb") as handle:
                self._md5[key] = hashlib.file_digest(handle, "md5").hexdigest()
        return self._md5[key]

    def files_of(self, out: Mapping[str, Any]) -> dict[str, str] | None:
        """Path -> md5 of each file of an output in dvc.lock; None if the list of a folder is missing or damaged."""
        path, md5 = out["path"], out.get("md5", "")
        if not md5.endswith(".dir"):
            return {path: md5}
        if not self.holds(md5):
            return None
        return {f"{path}/{row['relpath']}": row["md5"] for row in _LISTS.read_json(self.entry(md5))}

    def copy(self, name: str, out: Mapping[str, Any], target: Path) -> bool:
        """Copy `name`, an output or a part of one, to the new path `target`; much faster than `dvc get`.

        Returns False, without copying, if a file is not in this cache (it may be on a remote, or in git).
        """
        entries = {inner: self.entry(md5) for inner, md5 in self._below(name, out).items()}
        if not entries or not all(entry.is_file() for entry in entries.values()):
            return False
        if any(".." in Path(inner).parts for inner in entries):  # the list may be untrusted
            return False
        for inner, entry in entries.items():
            place = target / inner
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry, place)  # not a link: editing the copy must not change the cache
        return True

    def add(self, path: Path, md5: str) -> None:
        """Add a copy of an intact file."""
        with replacing(self.entry(md5)) as temporary:
            shutil.copyfile(path, temporary)
            temporary.chmod(0o444)  # as DVC does

    def forget(self) -> None:
        """Forget the md5s, so that files are read again."""
        self._md5.clear()

    def difference(self, path: Path, name: str, out: Mapping[str, Any]) -> str:
        """The first file in a fetched copy of `name` that differs from dvc.lock; empty if there is none."""
        files = self._below(name, out).items()
        return next((f"{name}/{inner}".rstrip("/") for inner, md5 in files if self.md5_of(path / inner) != md5), "")

    def _below(self, name: str, out: Mapping[str, Any]) -> dict[str, str]:
        """The md5 of each file at `name` in an output, by its path relative to `name` (empty for `name` itself)."""
        files = (self.files_of(out) or {}).items()
        return {place[len(name) + 1 :]: md5 for place, md5 in files if f"{place}/".startswith(f"{name}/")}
