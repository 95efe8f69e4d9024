"""One arm, one seed: a DVC experiment in a temporary copy, and the files of it that the comparison reads.

DVC is called as a program. It reuses every stage whose inputs did not change, leaves the workspace as it is, and files
each finished run as an experiment under the commit it started from (`dvc exp show`, `dvc exp apply NAME`). A run of the
same arm and seed is not made again, whatever commit it started from, as long as what it depends on is the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from coordexp.config.loading import parse_yaml
from coordexp.errors import ConfigError, Interrupted, TrainingError
from coordexp.experiments.dependencies import Past, Present
from coordexp.infra.files import remove
from coordexp.infra.provenance import WRITTEN_BY_STAGES

SHOWN_LINES = 15


@dataclass(frozen=True, slots=True)
class Experiment:
    """A finished run."""

    name: str
    revision: str


@dataclass(frozen=True, slots=True)
class Repository:
    """The repository that experiments run in; `say` gets one line for each thing that takes time."""

    root: Path
    say: Callable[[str], None]
    _pasts: dict[tuple[str, tuple[str, ...]], Past] = field(default_factory=dict, repr=False)

    def commit(self) -> str:
        """The commit that experiments start from. What stages write may differ from it: a run of the graph did that.

        Raises:
            ConfigError: no git repository, or other tracked files differ from the commit.
        """
        head = self._run("git", "rev-parse", "--verify", "HEAD")
        if head.returncode:
            raise ConfigError(
                f"{self.root.resolve()}: no git commit to start from. Run this in the repository.\n{_end(head.stderr)}"
            )
        written = [f":(exclude){path}" for path in WRITTEN_BY_STAGES]
        changed = self._git("status", "--porcelain", "--untracked-files=no", "--", ".", *written).splitlines()
        if changed:
            raise ConfigError(
                f"{len(changed)} tracked files differ from the commit, for example {changed[0][3:]}. An experiment is "
                "the commit plus its parameters, so that it can be made again: commit first (git commit -am ...), or "
                "go back to the commit (git restore --staged --worktree . && git clean -dfq reports/*/gallery && dvc "
                "checkout --force)."
            )
        return head.stdout.strip()

    def present(self, profile: str, read: Sequence[str]) -> Present:
        """What an experiment would depend on now; raises ConfigError if no stage makes one of the files to be read."""
        return Present.of(self.root, profile, read, lambda paths: self._ids("HEAD", paths))

    def experiment(self, name: str, run: str, overrides: Sequence[str], present: Present) -> Experiment:
        """The experiment of one arm and seed; runs it unless there is one, under any name, with the same dependencies.

        Args:
            name: of a new experiment.
            run: the end of the name, which says arm and seed: such experiments are tried first.
            overrides: what `dvc exp run -S` is given.
            present: what it would depend on now.

        Raises:
            Interrupted: it was stopped; the next call goes on from the states that the stages saved.
            TrainingError: a stage failed.
        """
        changed = ""
        named = self.experiments(f"ab-*-{run}", f"ab-*-{run}-[0-9]*")
        for found in [*named, *(other for other in self.experiments("*") if other not in named)]:
            change = present.change(self.past(found.revision, present), overrides)
            if not change:
                self.say(f"{name}: there already" + (f", as {found.name}" if found.name != name else ""))
                return found
            changed = change if found in named else changed
        why = f" (again: {changed} changed)" if changed else ""
        self.say(f"{name}: {' '.join(overrides) or 'no change'}{why}")
        made = self._new(name, overrides, present.targets)
        if edited := present.change(self.past(made.revision, present), overrides):
            raise TrainingError(
                f"{made.name}: {edited} changed in the working tree while experiments ran, so they cannot be compared. "
                "Commit or undo the change, and run the same command again: what it does not touch is not run again."
            )
        return made

    def fetch(self, revision: str, path: str, target: Path) -> None:
        """Copy an output (file or folder) of an experiment in place of `target`; TrainingError if DVC has it not."""
        remove(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        done = self._run("dvc", "get", ".", path, "--rev", revision, "--out", str(target.resolve()))
        if done.returncode or not target.exists():
            raise TrainingError(
                f"{path} of experiment {revision[:12]} cannot be read; dvc get ended with {done.returncode}:\n"
                f"{_end(done.stdout + done.stderr)}\n"
                "If the cache lost it (dvc gc), remove the experiment (dvc exp remove) and run this again."
            )

    def text(self, revision: str, path: str) -> str:
        """A file that git holds; raises ConfigError if it does not."""
        return self._git("show", f"{revision}:./{path}")

    def _new(self, name: str, overrides: Sequence[str], targets: Sequence[str]) -> Experiment:
        head = self._git("rev-parse", "HEAD").strip()
        folder = f"refs/exps/{head[:2]}/{head[2:]}"
        taken = self._git("for-each-ref", "--format=%(refname:lstrip=4)", folder).split()
        if name in taken:  # with other dependencies, for example after stage 1 was trained again
            name = next(free for n in count(2) if (free := f"{name}-{n}") not in taken)
        assignments = [part for override in overrides for part in ("--set-param", override)]
        done = self._run("dvc", "exp", "run", "--temp", "--name", name, *assignments, *targets)
        found = self._run("git", "rev-parse", "--verify", "--quiet", f"{folder}/{name}").stdout.strip()
        if found:
            return Experiment(name, found)
        output = done.stdout + done.stderr
        if "interrupted:" in output:
            raise Interrupted(f"{name} was stopped; run the same command again, it resumes.\n{_end(output)}")
        raise TrainingError(f"{name}: dvc exp run ended with {done.returncode} and left no experiment:\n{_end(output)}")

    def experiments(self, *names: str) -> list[Experiment]:
        """Experiments under any commit whose name is like one of `names`, the newest first."""
        form = "--format=%(refname:lstrip=4) %(objectname)"
        patterns = [f"refs/exps/*/*/{name}" for name in names]
        lines = self._git("for-each-ref", "--sort=-committerdate", form, *patterns).splitlines()
        return [Experiment(*line.split()) for line in lines]

    def past(self, revision: str, present: Present) -> Past:
        """What an experiment ran with."""
        key = revision, present.given
        if key not in self._pasts:
            shown = self._run("git", "show", f"{revision}:./dvc.lock")
            lock = parse_yaml(shown.stdout, f"dvc.lock of {revision[:12]}") if shown.returncode == 0 else {}
            files = present.input_files().items()
            told = {stage: self._run("git", "show", f"{revision}:./{path}") for stage, path in files}
            inputs = {stage: json.loads(shown.stdout) for stage, shown in told.items() if shown.returncode == 0}
            self._pasts[key] = Past(lock.get("stages", {}), self._ids(revision, present.given), inputs)
        return self._pasts[key]

    def _ids(self, revision: str, paths: Sequence[str]) -> dict[str, str]:
        """Path -> id of the content, for those paths that git holds at a revision."""
        entries = self._git("ls-tree", "-z", revision, "--", *paths).split("\0") if paths else []
        pairs = (entry.split("\t", 1) for entry in entries if entry)
        return {path: fields.split()[2] for fields, path in pairs}

    def _git(self, *arguments: str) -> str:
        done = self._run("git", *arguments)
        if done.returncode:
            raise ConfigError(f"git {' '.join(arguments[:3])} ended with {done.returncode}:\n{_end(done.stderr)}")
        return done.stdout

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program that is installed beside this interpreter, or on the path."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return subprocess.run(
            command,
            cwd=self.root,
            env=os.environ | {"PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )


def _end(output: str, lines: int = SHOWN_LINES) -> str:
    return "\n".join(output.strip().splitlines()[-lines:])
