"""A temporary repository with this working tree, in which tests run the graph of the smoke profile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coordexp.config.paths import CHECKPOINTS
from workspaces import change_yaml

STAGES = (
    *("check", "raw", "convert", "norm1000", "pack", "stage1"),
    *("rollout", "stage2", "stage1-control", *(f"decode@{name}" for name in CHECKPOINTS), "coco-eval", "report"),
)


@dataclass(frozen=True, slots=True)
class Clone:
    """A temporary repository with this working tree as its only commit, and the smoke profile chosen.

    `warm` is the folder of a `python` that forks (tests/warm_python.py); without it, each stage starts an interpreter.
    """

    root: Path
    home: Path
    warm: Path | None = None

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the clone and wait for it; stderr is merged into stdout."""
        with self.start(*command) as process:
            output, _ = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, output)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user with an empty home folder."""
        front = [str(folder) for folder in (self.warm, Path(sys.executable).parent) if folder]
        return {
            "PATH": os.pathsep.join([*front, os.environ["PATH"]]),
            "HOME": str(self.home),
            "DVC_SITE_CACHE_DIR": str(self.home / "dvc"),
            "DVC_NO_ANALYTICS": "1",
            "OMP_NUM_THREADS": "1",
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@localhost",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@localhost",
        }

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command as this user would, as the leader of a session and process group."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def succeed(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"
        return done.stdout

    def commit(self, message: str) -> None:
        self.succeed("git", "add", "--all")
        self.succeed("git", "commit", "--quiet", "--message", message)

    def copy(self, folder: Path) -> Clone:
        """Another clone with the same files, results and history, which a test may modify."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.root, folder / "clone", symlinks=True, copy_function=_copied)
        shutil.copytree(self.home, folder / "home", symlinks=True, ignore=shutil.ignore_patterns("dvc"))
        return replace(self, root=folder / "clone", home=folder / "home")

    def without_experiments(self) -> Clone:
        """The clone itself, back at the commit; the run cache keeps the stages, so that they take no time again."""
        self.succeed("dvc", "exp", "remove", "--all-commits")
        self.succeed("git", "checkout", "--quiet", "--force", "HEAD")
        self.succeed("dvc", "checkout", "--quiet", "--force")
        return self


def _copied(source: str, target: str) -> None:
    """Share the files of the DVC cache, which are never modified; copy all others with their times."""
    if f"{os.sep}.dvc{os.sep}cache{os.sep}files{os.sep}" in source:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def new_clone(
    repository: Path, root: Path, home: Path, changes: Mapping[str, Any] | None = None, warm: Path | None = None
) -> Clone:
    """The clone before its first run, with some keys of the profile changed."""
    copy = Clone(root, home, warm)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        source = repository / name
        if source.is_symlink() or source.is_file():  # a file deleted but not yet committed is listed too
            target = copy.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    params = copy.root / "params.yaml"
    params.write_text(re.sub(r"(?m)^profile: \S+", "profile: smoke", params.read_text()))
    if changes:
        change_yaml(copy.root / "configs" / "smoke.yaml", changes)
    (copy.root / "dvc.lock").unlink(missing_ok=True)  # it names another profile's outputs
    copy.succeed("git", "init", "--quiet", "--initial-branch", "main")
    copy.commit("working tree")
    return copy
