"""One arm, one seed: a DVC experiment in a temporary copy, and the files of it that the comparison reads.

DVC is called as a program. It reuses every stage whose inputs did not change, leaves the workspace as it is, and files
each finished run as an experiment under the commit it started from (`dvc exp show`, `dvc exp apply NAME`). A run whose
name, which says arm and seed, is there already is not made again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordexp.errors import ConfigError, Interrupted, TrainingError

SHOWN_LINES = 15


@dataclass(frozen=True, slots=True)
class Repository:
    """The repository that experiments run in; `say` gets one line for each thing that takes time."""

    root: Path
    say: Callable[[str], None]

    def commit(self) -> str:
        """The commit that experiments start from.

        Raises:
            ConfigError: no git repository, or tracked files differ from the commit.
        """
        head = self._run("git", "rev-parse", "HEAD")
        if head.returncode:
            raise ConfigError(f"{self.root.resolve()}: no git commit to start from. Run this in the repository.")
        changed = self._run("git", "status", "--porcelain", "--untracked-files=no").stdout.splitlines()
        if changed:
            raise ConfigError(
                f"{len(changed)} tracked files differ from the commit, for example {changed[0][3:]}. An experiment is "
                "the commit plus its parameters, so that it can be made again: commit first (git commit -am ...)."
            )
        return head.stdout.strip()

    def experiment(self, name: str, overrides: Sequence[str]) -> str:
        """The revision of an experiment; runs it unless this commit has one of that name.

        Raises:
            Interrupted: it was stopped; the next call goes on from the states that the stages saved.
            TrainingError: a stage failed.
        """
        if found := self._revision(name):
            self.say(f"{name}: there already")
            return found
        assignments = [part for override in overrides for part in ("--set-param", override)]
        self.say(f"{name}: {' '.join(overrides) or 'no change'}")
        done = self._run("dvc", "exp", "run", "--temp", "--name", name, *assignments)
        if found := self._revision(name):
            return found
        tail = "\n".join(done.stdout.splitlines()[-SHOWN_LINES:])
        if "interrupted:" in done.stdout:
            raise Interrupted(f"{name} was stopped; run the same command again, it resumes.\n{tail}")
        raise TrainingError(f"{name}: dvc exp run ended with {done.returncode} and left no experiment:\n{tail}")

    def fetch(self, revision: str, path: str, target: Path) -> None:
        """Copy an output (file or folder) of an experiment; raises TrainingError if DVC has it not."""
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        done = self._run("dvc", "get", ".", path, "--rev", revision, "--out", str(target.resolve()), "--quiet")
        if done.returncode:
            raise TrainingError(f"{path} of {revision[:12]} cannot be read: {done.stdout.strip()[-500:]}")

    def _revision(self, name: str) -> str:
        head = self._run("git", "rev-parse", "HEAD").stdout.strip()
        found = self._run("git", "rev-parse", "--verify", "--quiet", f"refs/exps/{head[:2]}/{head[2:]}/{name}")
        return found.stdout.strip()

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program that is installed beside this interpreter, or on the path; stderr is merged into stdout."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return subprocess.run(
            command,
            cwd=self.root,
            env=os.environ | {"PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
