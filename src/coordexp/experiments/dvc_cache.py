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
        for place, md5 in (self.files_of(out) or {}).items():
            inner = "" if place == name else place.removeprefix(f"{name}/")
            if inner != place and self.md5_of(path / inner if inner else path) != md5:
                return place
        return ""
