"""DVC's cache on this machine: which content it holds, by md5. DVC itself never looks again at what it has linked."""

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
_folders: dict[Path, Path] = {}  # of repositories: asking DVC takes a second
_LISTS = Gate("a list of files in DVC's cache", DamagedArtefactError, "Run the stage that wrote it again.", 1 << 30)
_ENTRY = re.compile(r"[0-9a-f]{30}(\.dir)?")


@dataclass(slots=True)
class DvcCache:
    """DVC's cache on this machine, whose entries are named by the md5 of their content."""

    folder: Path
    _md5: dict[tuple[int, ...], str] = field(default_factory=dict, repr=False)  # by inode and time: links are one file

    @classmethod
    def of(cls, root: Path, run: Run) -> DvcCache:
        """That of a repository, in which `run` runs programs; raises ConfigError outside of one."""
        if (place := root.resolve()) not in _folders:
            done = run("dvc", "cache", "dir")
            if done.returncode:
                raise ConfigError(f"{place}: no DVC repository: run this where dvc.yaml is.\n{done.stderr}")
            _folders[place] = place / done.stdout.strip() / "files" / "md5"
        return cls(_folders[place])

    def entry(self, md5: str) -> Path:
        """Where the content with this md5 lies, if it is there."""
        return self.folder / md5[:2] / md5[2:]

    def holds(self, md5: str) -> bool:
        """Whether a content is there and whole."""
        path = self.entry(md5)
        return path.is_file() and self.md5_of(path) == md5.removesuffix(".dir")

    def entries(self) -> Iterator[Path]:
        """All entries."""
        for path in sorted(self.folder.glob("??/*")):
            if _ENTRY.fullmatch(path.name):
                yield path

    def md5_of(self, path: Path) -> str:
        """The md5 of a file, read once however many links it has."""
        found = path.stat()
        key = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        if key not in self._md5:
            with path.open("rb") as handle:
                self._md5[key] = hashlib.file_digest(handle, "md5").hexdigest()
        return self._md5[key]

    def files_of(self, out: Mapping[str, Any]) -> dict[str, str] | None:
        """Path -> md5 of each file of an output of dvc.lock; None if the list of a folder is not there, or damaged."""
        path, md5 = out["path"], out.get("md5", "")
        if not md5.endswith(".dir"):
            return {path: md5}
        if not self.holds(md5):
            return None
        return {f"{path}/{row['relpath']}": row["md5"] for row in _LISTS.read_json(self.entry(md5))}

    def copy(self, name: str, out: Mapping[str, Any], target: Path) -> bool:
        """Copy `name`, in or of an output, to `target`, which does not exist; a moment where `dvc get` takes seconds.

        False, and nothing there, if not all of it is here: on a remote, or held by git.
        """
        entries = {inner: self.entry(md5) for inner, md5 in self._below(name, out).items()}
        if not entries or not all(entry.is_file() for entry in entries.values()):
            return False
        if any(".." in Path(inner).parts for inner in entries):  # a list of somebody else
            return False
        for inner, entry in entries.items():
            place = target / inner
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry, place)  # not a link: the cache must not change if somebody edits it
        return True

    def add(self, path: Path, md5: str) -> None:
        """Keep a copy of a good file."""
        with replacing(self.entry(md5)) as temporary:
            shutil.copyfile(path, temporary)
            temporary.chmod(0o444)  # as DVC does

    def forget(self) -> None:
        """Read again what is asked from now on."""
        self._md5.clear()

    def difference(self, path: Path, name: str, out: Mapping[str, Any]) -> str:
        """The first file of a fetched copy of `name`, in or of an output, that is not what dvc.lock records."""
        files = self._below(name, out).items()
        return next((f"{name}/{inner}".rstrip("/") for inner, md5 in files if self.md5_of(path / inner) != md5), "")

    def _below(self, name: str, out: Mapping[str, Any]) -> dict[str, str]:
        """The md5 of what an output has at `name`: of each file by its path from there, of a file by an empty path."""
        files = (self.files_of(out) or {}).items()
        return {place[len(name) + 1 :]: md5 for place, md5 in files if f"{place}/".startswith(f"{name}/")}
