"""The repository for experiments: revisions, their dependencies, their files, and new runs.

DVC is called as a program. It reuses every stage whose inputs did not change, runs in a temporary copy, so the
workspace does not change, and stores each finished run as an experiment under the commit that it started from. A run is
reused, from any commit, as long as its dependencies are the same. Files of a revision are copied from DVC's cache once,
to `runs/revisions/<revision>/` followed by their path in the graph.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from coordexp.config.loading import load_params, parse_params, parse_yaml
from coordexp.config.paths import ProfilePaths
from coordexp.config.schema import Params
from coordexp.errors import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    BusyError,
    ConfigError,
    CoordExpError,
    DamagedArtefactError,
    DataError,
    Interrupted,
    TrainingError,
    closest,
)
from coordexp.experiments.dependencies import INPUTS, Past, Present, by_path
from coordexp.experiments.dvc_cache import DvcCache
from coordexp.experiments.progress import Ended, Progress, stream
from coordexp.infra.files import remove
from coordexp.infra.foreign import Gate
from coordexp.infra.provenance import WRITTEN_BY_STAGES, write_json
from coordexp.infra.resume import RESUME, holding
from coordexp.inputs import INPUTS as INPUT_FILES
from coordexp.inputs import PARAMS_FILE

SHOWN_LINES = 15
RUN_RECORD = Gate("the record of a run", DataError, "Delete it: only the times of its stages are lost.")
KEPT = Path("runs/revisions")  # files by revision, and the times of its stages
WORKSPACE = "workspace"  # used instead of a revision
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_EXIT_CODE = re.compile(r"exited with (\d+)")
_ERRORS: Mapping[int, type[CoordExpError]] = {
    EXIT_USAGE: ConfigError,
    EXIT_INTERRUPTED: Interrupted,
}  # by exit code of the failed stage


@dataclass(frozen=True, slots=True)
class Experiment:
    """A finished run: an experiment, or a commit."""

    name: str
    revision: str
    start: str = ""  # the commit from which an experiment started
    unix_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Repository:
    """The repository in which experiments run; `say` gets one line per slow operation."""

    root: Path
    say: Callable[[str], None]
    _pasts: dict[str, Past] = field(default_factory=dict, repr=False)

    def commit(self) -> Experiment:
        """The commit from which experiments start. Outputs of stages may differ from it, after a run of the graph.

        Raises:
            ConfigError: this is not a git repository, or other tracked files differ from the commit.
        """
        head = self.run("git", "rev-parse", "--verify", "HEAD")
        if head.returncode:
            raise ConfigError(
                f"{self.root.resolve()}: no git commit found. Run this in the repository.\n{_end(head.stderr)}"
            )
        written = [f":(exclude){path}" for path in WRITTEN_BY_STAGES]
        changed = self._git("status", "--porcelain", "--untracked-files=no", "--", ".", *written).splitlines()
        if changed:
            raise ConfigError(
                f"{len(changed)} tracked files differ from the commit, for example {changed[0][3:]}. An experiment "
                "must be reproducible from the commit and its parameters. Give values with -S, and commit first (git "
                "commit -am ...), or undo the changes (git restore --staged --worktree . && dvc checkout --force)."
            )
        branch = self.run("git", "symbolic-ref", "--short", "--quiet", "HEAD").stdout.strip()
        revision = head.stdout.strip()
        return Experiment(branch or revision[:8], revision)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the experiments of this repository for this process; raises BusyError if another one runs some."""
        with holding(self.root / RESUME / "experiments", "coordexp run or ab", waits=False):
            yield

    def resolve(self, name: str) -> Experiment:
        """A revision by name: `workspace`, a git revision, or the newest experiment with that name under any commit.

        Raises:
            ConfigError: there is no such revision.
        """
        if name == WORKSPACE:
            return Experiment(WORKSPACE, WORKSPACE, self._git("rev-parse", "HEAD").strip())
        if revision := self._revision(f"{name}^{{commit}}"):
            return Experiment(name, revision, self._revision(f"{name}^"))
        if NAME.fullmatch(name) and (found := self.experiments(name)):
            return found[0]
        known = [one.name for one in self.experiments("*")]
        known += self._git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads", "refs/tags").split()
        raise ConfigError(
            f"{name!r}: not a file, git revision or experiment.{closest(name, known)} `coordexp runs --all` lists the "
            "experiments."
        )

    def experiments(self, *names: str) -> list[Experiment]:
        """Experiments under any commit whose name matches one of the patterns `names`, newest first."""
        form = "--format=%(refname:lstrip=2) %(objectname) %(committerdate:unix)"
        patterns = [f"refs/exps/*/*/{name}" for name in names]
        lines = self._git("for-each-ref", "--sort=-committerdate", form, *patterns).splitlines()
        rows = (line.split() for line in lines)
        return [
            Experiment(name, revision, first + rest, int(date))
            for ref, revision, date in rows
            for first, rest, name in [ref.split("/")]
        ]

    def present(self, profile: str, read: Sequence[str]) -> Present:
        """The dependencies of an experiment that would run now; raises ConfigError if no stage makes a needed file."""
        return Present.of(self.root, profile, read, lambda paths: self._ids("HEAD", paths))

    def find(
        self, overrides: Sequence[str], present: Present, first: Sequence[Experiment]
    ) -> tuple[Experiment | None, str]:
        """A finished run with the same dependencies and available files, or None and what changed since `first`.

        Args:
            overrides: the arguments of `dvc exp run -S`.
            present: the dependencies of a run now.
            first: candidates to try before all other experiments.
        """
        changed = ""
        revisions = {one.revision for one in first}
        for found in [*first, *(one for one in self.experiments("*") if one.revision not in revisions)]:
            change = present.change(self.past(found.revision, present), overrides)
            if not change and self._has(found, present.read):
                return found, ""
            changed = change if found.revision in revisions and found.start else changed  # a commit is not an old arm
        return None, changed

    def experiment(
        self,
        name: str,
        overrides: Sequence[str],
        present: Present,
        first: Sequence[Experiment] = (),
        targets: Sequence[str] = (),
    ) -> Experiment:
        """The experiment with these values; runs it unless one with the same dependencies exists under any name.

        Args:
            name: name of a new experiment.
            overrides: the arguments of `dvc exp run -S`.
            present: the dependencies of a run now.
            first: candidates to try before all other experiments.
            targets: the stages to run; by default all.

        Raises:
            Interrupted: it was stopped; the next call resumes from the states that the stages saved.
            CoordExpError: a stage failed; the class depends on its exit code.
        """
        found, changed = self.find(overrides, present, first)
        if found:
            self.say(f"{name}: exists" + (f" as {found.name}" if found.name != name else ""))
            return found
        why = f" (runs again: {changed} changed)" if changed else ""
        self.say(f"{name}: {' '.join(overrides) or 'no change'}{why}")
        made = self._new(name, overrides, targets, present.files.profile_name)
        if edited := present.change(self.past(made.revision, present), overrides):
            raise TrainingError(
                f"{made.name}: {edited} changed in the working tree while experiments ran, so they are not comparable. "
                "Commit or undo the change, and run the same command again: unaffected runs are not repeated."
            )
        return made

    def fetch(self, revision: str, path: str) -> Path:
        """A file or folder of the graph at a revision, copied from DVC's cache once; raises DataError."""
        if revision == WORKSPACE:
            if not (self.root / path).exists():
                raise DataError(f"{path}: not in the workspace. Run `dvc repro` or `dvc checkout`, or use a revision.")
            return self.root / path
        target = self.root / KEPT / revision / path
        # The folder alone proves nothing: it also exists if only a part of it was fetched.
        is_whole = self.root / KEPT / revision / "whole" / path.replace("/", "%2F")
        if target.is_file() or (target.is_dir() and is_whole.is_file()):
            return target
        new = target.with_name(f".{target.name}.{os.getpid()}.part")
        remove(new)
        _make_folder(target.parent)
        cache = DvcCache.of(self.root, self.run)
        outs = self.past(revision).outs(path)
        if not (len(outs) == 1 and cache.copy(path, outs[0], new)):
            self._get(revision, path, new)
        if damaged := next(filter(None, (cache.difference(new, path, out) for out in outs)), ""):
            remove(new)
            raise DamagedArtefactError(
                f"{damaged} of {revision[:12]}: the content differs from dvc.lock, so DVC's cache is damaged. Remove "
                "the damage with `coordexp verify --repair`; then `dvc pull`, or run the revision again."
            )
        if new.is_dir():
            remove(target)
            is_whole.parent.mkdir(parents=True, exist_ok=True)
            is_whole.touch()
        new.replace(target)
        return target

    def _get(self, revision: str, path: str, new: Path) -> None:
        done = self.run("dvc", "get", ".", path, "--rev", revision, "--out", str(new.resolve()))
        if done.returncode or not new.exists():
            remove(new)
            raise DataError(
                f"{path} of {revision[:12]} cannot be read; dvc get ended with {done.returncode}:\n"
                f"{_end(done.stdout + done.stderr)}\n"
                "If it is on a remote, fetch it with `dvc pull` (for a commit) or `dvc exp pull`. If it was removed "
                "from the cache (dvc gc), run the revision again."
            )

    def _has(self, found: Experiment, paths: Sequence[str]) -> bool:
        """Whether the files of a revision are available; reports a missing one."""
        try:
            for path in paths:
                self.fetch(found.revision, path)
        except DataError as error:
            self.say(f"{found.name} ran with the same values, but {str(error).splitlines()[0]}")
            return False
        return True

    def text(self, revision: str, path: str) -> str:
        """The text of a file that git tracks; raises ConfigError if it does not."""
        if revision == WORKSPACE:
            return (self.root / path).read_text(encoding="utf-8")
        return self._git("show", f"{revision}:./{path}")

    def params(self, revision: str) -> Params:
        """The parameters of a revision; raises ConfigError as `load_params`."""
        if revision == WORKSPACE:
            return load_params(self.root / PARAMS_FILE)
        where = f"{PARAMS_FILE} of {revision[:12]}"
        return parse_params(where, parse_yaml(self.text(revision, PARAMS_FILE), where))

    def past(self, revision: str, present: Present | None = None) -> Past:
        """The dependencies with which a revision ran."""
        given = present.given if present else ()
        key = " ".join((revision, *given))
        if key not in self._pasts:
            alone = self._pasts.get(revision) or self._past(revision)  # cached, because parsing the lock file is slow
            self._pasts[revision] = alone
            self._pasts[key] = replace(alone, ids=self._ids(revision, given))
        return self._pasts[key]

    def _past(self, revision: str) -> Past:
        names = self._names(revision, f"{INPUTS}/", "dvc.lock")
        where = f"dvc.lock of {revision[:12]}"
        lock = parse_yaml(self.text(revision, "dvc.lock"), where) if "dvc.lock" in names else {}
        texts = {path: self.text(revision, path) for path in names if path.endswith(".json")}
        read = {path for entry in lock.get("stages", {}).values() for path in by_path(entry, "deps")}
        return Past(
            lock=lock.get("stages", {}),
            ids={},
            inputs={
                path: INPUT_FILES.parse_json(text, f"{path} of {revision[:12]}")
                for path, text in texts.items()
                if path in read
            },
            inputs_md5={path: hashlib.md5(text.encode()).hexdigest() for path, text in texts.items()},
        )

    def seconds(self, revision: str) -> dict[str, float]:
        """Seconds by stage of a revision that this repository ran; restored stages have no entry."""
        file = self.root / KEPT / revision / "seconds.json"
        return RUN_RECORD.read_object(file).get("stages", {}) if file.is_file() else {}

    def estimates(self, profile: str) -> dict[str, float]:
        """Seconds by stage, from the last measured run in the workspace or of an experiment."""
        runs = ProfilePaths(profile, self.root).run_record("*")
        files = [*runs.parent.glob(runs.name), *(self.root / KEPT).glob("*/seconds.json")]
        found: dict[str, float] = {}
        for file in sorted(files, key=lambda file: file.stat().st_mtime):
            tree = RUN_RECORD.read_object(file)
            if tree.keys() >= {"stage", "wall_seconds"}:
                found[tree["stage"]] = tree["wall_seconds"]
            elif tree.get("profile") == profile:
                found |= tree.get("stages", {})
        return found

    def short_name(self, revision: str) -> str:
        """A branch or tag at this revision, or the start of its hash."""
        form = "--format=%(refname:lstrip=2)"
        named = self._git("for-each-ref", "--points-at", revision, form, "refs/heads", "refs/tags").split()
        return named[0] if named else revision[:8]

    def is_taken(self, name: str) -> bool:
        """Whether an experiment under any commit has this name."""
        return bool(self.experiments(name))

    def _new(self, name: str, overrides: Sequence[str], targets: Sequence[str], profile: str) -> Experiment:
        if self.is_taken(name):  # by a run with other dependencies, for example from before stage 1 changed
            name = next(free for n in count(2) if not self.is_taken(free := f"{name}-{n}"))
        assignments = [part for override in overrides for part in ("--set-param", override)]
        log = self.root / "runs" / "experiments" / f"{name}.log"
        progress = Progress(name, self.estimates(profile), self.say)
        command = ["dvc", "exp", "run", "--temp", "--name", name, *assignments, *targets]
        ended = stream(command, self.root, log, progress, self._environment())
        if found := self.experiments(name):
            times = {"profile": profile, "stages": progress.seconds}
            write_json(self.root / KEPT / found[0].revision / "seconds.json", times)
            return found[0]
        raise _failure(name, ended, log)

    def _revision(self, name: str) -> str:
        return self.run("git", "rev-parse", "--verify", "--quiet", "--end-of-options", name).stdout.strip()

    def _names(self, revision: str, *paths: str) -> list[str]:
        """The files at these paths that git tracks at a revision, or in the workspace."""
        listing = ["ls-files"] if revision == WORKSPACE else ["ls-tree", "-r", "--name-only", revision]
        names = self._git(*listing[:1], "-z", *listing[1:], "--", *paths).split("\0")
        return [name for name in names if name and (revision != WORKSPACE or (self.root / name).is_file())]

    def _ids(self, revision: str, paths: Sequence[str]) -> dict[str, str]:
        """Path -> git's object id, for the paths that git tracks at a revision."""
        entries = self._git("ls-tree", "-z", revision, "--", *paths).split("\0") if paths else []
        pairs = (entry.split("\t", 1) for entry in entries if entry)
        return {path: fields.split()[2] for fields, path in pairs}

    def _git(self, *arguments: str) -> str:
        done = self.run("git", *arguments)
        if done.returncode:
            raise ConfigError(f"git {' '.join(arguments[:3])} ended with {done.returncode}:\n{_end(done.stderr)}")
        return done.stdout

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program from the folder of this interpreter, or from the path."""
        return subprocess.run(
            command,
            cwd=self.root,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )

    def _environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return os.environ | {"PATH": path}


def _failure(name: str, ended: Ended, log: Path) -> CoordExpError:
    """The error of a run without an experiment, by the exit code of its stage."""
    output = f"{_end(ended.output)}\nThe complete output is in {log}."
    codes = _EXIT_CODE.findall(ended.output)
    if ended.stopped or "interrupted:" in ended.output:
        return Interrupted(f"{name} was stopped; run the same command again to resume.\n{output}")
    if "Unable to acquire lock" in ended.output:
        return BusyError(f"{name}: another DVC command has locked this repository; wait, then run again.\n{output}")
    kind = _ERRORS.get(int(codes[-1]) if codes else 1, TrainingError)
    return kind(f"{name}: dvc exp run ended with {ended.code} without an experiment:\n{output}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder}: a file is in the way. Expected a folder; move the file.") from error


def _end(output: str, lines: int = SHOWN_LINES) -> str:
    return "\n".join(output.strip().splitlines()[-lines:])
