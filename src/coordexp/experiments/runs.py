"""The repository as experiments see it: revisions, what each ran with, its files, and new runs.

DVC is called as a program. It reuses every stage whose inputs did not change, runs in a temporary copy, so that the
workspace stays as it is, and files each finished run as an experiment under the commit that it started from. A run is
not made again, whatever commit it started from, as long as what it depends on is the same. Files of a revision are
taken from DVC's cache once, and kept under `runs/revisions/<revision>/` at the path that they have in the graph.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from coordexp.inputs import PARAMS_FILE, overlap

SHOWN_LINES = 15
RUN_RECORD = Gate("the record of a run", DataError, "Delete it: only how long its stages took is lost.")
KEPT = Path("runs/revisions")  # files by revision, and how long its stages took
WORKSPACE = "workspace"  # in place of a revision
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_EXIT_CODE = re.compile(r"exited with (\d+)")
_ERRORS: Mapping[int, type[CoordExpError]] = {
    EXIT_USAGE: ConfigError,
    EXIT_INTERRUPTED: Interrupted,
}  # by exit code of the failed stage


@dataclass(frozen=True, slots=True)
class Experiment:
    """A finished run: an experiment, or a commit that holds one."""

    name: str
    revision: str
    start: str = ""  # the commit that an experiment started from
    unix_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Repository:
    """The repository that experiments run in; `say` gets one line for each thing that takes time."""

    root: Path
    say: Callable[[str], None]
    _pasts: dict[str, Past] = field(default_factory=dict, repr=False)

    def commit(self) -> Experiment:
        """The commit that experiments start from. What stages write may differ from it: a run of the graph did that.

        Raises:
            ConfigError: no git repository, or other tracked files differ from the commit.
        """
        head = self.run("git", "rev-parse", "--verify", "HEAD")
        if head.returncode:
            raise ConfigError(
                f"{self.root.resolve()}: no git commit to start from. Run this in the repository.\n{_end(head.stderr)}"
            )
        written = [f":(exclude){path}" for path in WRITTEN_BY_STAGES]
        changed = self._git("status", "--porcelain", "--untracked-files=no", "--", ".", *written).splitlines()
        if changed:
            raise ConfigError(
                f"{len(changed)} tracked files differ from the commit, for example {changed[0][3:]}. An experiment is "
                "the commit plus its parameters, so that it can be made again: give values by -S, and commit first "
                "(git commit -am ...), or go back to the commit (git restore --staged --worktree . && dvc "
                "checkout --force)."
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
        """A revision by its name: `workspace`, what git knows, or an experiment under any commit, the newest first.

        Raises:
            ConfigError: there is none.
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
            f"{name!r}: no file, no revision that git knows, and no experiment.{closest(name, known)} "
            "`coordexp runs --all` lists the experiments."
        )

    def experiments(self, *names: str) -> list[Experiment]:
        """Experiments under any commit whose name is like one of `names`, the newest first."""
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
        """What an experiment would depend on now; raises ConfigError if no stage makes one of the files to be read."""
        return Present.of(self.root, profile, read, lambda paths: self._ids("HEAD", paths))

    def find(
        self, overrides: Sequence[str], present: Present, first: Sequence[Experiment]
    ) -> tuple[Experiment | None, str]:
        """A finished run with the same dependencies whose files can be had, and what changed since those tried first.

        Args:
            overrides: what `dvc exp run -S` is given.
            present: what it would depend on now.
            first: tried before all other experiments.
        """
        changed = ""
        revisions = {one.revision for one in first}
        for found in [*first, *(one for one in self.experiments("*") if one.revision not in revisions)]:
            change = present.change(self.past(found.revision, present), overrides)
            if not change and self._has(found, present.read):
                return found, ""
            changed = change if found.revision in revisions else changed
        return None, changed

    def experiment(
        self,
        name: str,
        overrides: Sequence[str],
        present: Present,
        first: Sequence[Experiment] = (),
        targets: Sequence[str] = (),
    ) -> Experiment:
        """The experiment with these values; run unless there is one, under any name, with the same dependencies.

        Args:
            name: of a new experiment.
            overrides: what `dvc exp run -S` is given.
            present: what it would depend on now.
            first: tried before all other experiments.
            targets: the stages to run, all without any.

        Raises:
            Interrupted: it was stopped; the next call goes on from the states that the stages saved.
            CoordExpError: a stage failed, by its exit code.
        """
        found, changed = self.find(overrides, present, first)
        if found:
            self.say(f"{name}: there already" + (f", as {found.name}" if found.name != name else ""))
            return found
        why = f" (again: {changed} changed)" if changed else ""
        self.say(f"{name}: {' '.join(overrides) or 'no change'}{why}")
        made = self._new(name, overrides, targets, present.files.profile_name)
        if edited := present.change(self.past(made.revision, present), overrides):
            raise TrainingError(
                f"{made.name}: {edited} changed in the working tree while experiments ran, so they cannot be compared. "
                "Commit or undo the change, and run the same command again: what it does not touch is not run again."
            )
        return made

    def fetch(self, revision: str, path: str) -> Path:
        """A file or folder of the graph as it was at a revision, taken from DVC's cache once; raises DataError."""
        if revision == WORKSPACE:
            if not (self.root / path).exists():
                raise DataError(
                    f"{path}: not in the workspace. Run `dvc repro`, or `dvc checkout`, or name a revision."
                )
            return self.root / path
        target = self.root / KEPT / revision / path
        if target.exists():
            return target
        new = target.with_name(f".{target.name}.{os.getpid()}.part")
        remove(new)
        _make_folder(target.parent)
        done = self.run("dvc", "get", ".", path, "--rev", revision, "--out", str(new.resolve()))
        if done.returncode or not new.exists():
            remove(new)
            raise DataError(
                f"{path} of {revision[:12]} cannot be read; dvc get ended with {done.returncode}:\n"
                f"{_end(done.stdout + done.stderr)}\n"
                "If it is on a remote, `dvc pull` (of a commit) or `dvc exp pull` fetches it. If the cache lost it "
                "(dvc gc), run the revision again."
            )
        if damaged := self._damaged(new, revision, path):
            remove(new)
            raise DamagedArtefactError(
                f"{damaged} of {revision[:12]}: not the content that dvc.lock recorded; DVC's cache is damaged. "
                "`coordexp verify --repair` removes what is; then `dvc pull` it, or run the revision again."
            )
        new.replace(target)
        return target

    def _damaged(self, fetched: Path, revision: str, path: str) -> str:
        """The first file of a fetched output that is not what its revision recorded."""
        cache = DvcCache.of(self.root, self.run)
        outs = [out for entry in self.past(revision).lock.values() for out in entry.get("outs", [])]
        found = (cache.difference(fetched, path, out) for out in outs if overlap(out["path"], path))
        return next(filter(None, found), "")

    def _has(self, found: Experiment, paths: Sequence[str]) -> bool:
        """Whether the files of a revision can be had; says which cannot."""
        try:
            for path in paths:
                self.fetch(found.revision, path)
        except DataError as error:
            self.say(f"{found.name} ran with the same values, but {str(error).splitlines()[0]}")
            return False
        return True

    def text(self, revision: str, path: str) -> str:
        """A file that git holds; raises ConfigError if it does not."""
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
        """What a revision ran with."""
        given = present.given if present else ()
        key = " ".join((revision, *given))
        if key not in self._pasts:
            names = self._names(revision, f"{INPUTS}/", "dvc.lock")
            where = f"dvc.lock of {revision[:12]}"
            lock = parse_yaml(self.text(revision, "dvc.lock"), where) if "dvc.lock" in names else {}
            texts = {path: self.text(revision, path) for path in names if path.endswith(".json")}
            read = {path for entry in lock.get("stages", {}).values() for path in by_path(entry, "deps")}
            self._pasts[key] = Past(
                lock=lock.get("stages", {}),
                ids=self._ids(revision, given),
                inputs={
                    Path(path).stem: INPUT_FILES.parse_json(text, f"{path} of {revision[:12]}")
                    for path, text in texts.items()
                    if path in read
                },
                inputs_md5={path: hashlib.md5(text.encode()).hexdigest() for path, text in texts.items()},
            )
        return self._pasts[key]

    def seconds(self, revision: str) -> dict[str, float]:
        """How long the stages that a revision ran took, where this repository ran it; those restored took none."""
        file = self.root / KEPT / revision / "seconds.json"
        return RUN_RECORD.read_object(file).get("stages", {}) if file.is_file() else {}

    def estimates(self, profile: str) -> dict[str, float]:
        """Seconds by stage of the last run that was measured, in the workspace or as an experiment."""
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
        """A branch or tag that is this revision, or the start of its number."""
        form = "--format=%(refname:lstrip=2)"
        named = self._git("for-each-ref", "--points-at", revision, form, "refs/heads", "refs/tags").split()
        return named[0] if named else revision[:8]

    def is_taken(self, name: str) -> bool:
        """Whether an experiment under any commit has this name."""
        return bool(self.experiments(name))

    def _new(self, name: str, overrides: Sequence[str], targets: Sequence[str], profile: str) -> Experiment:
        if self.is_taken(name):  # with other dependencies, for example after stage 1 was trained again
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
        """The files at these paths that git holds at a revision, or now in the workspace."""
        listing = ["ls-files"] if revision == WORKSPACE else ["ls-tree", "-r", "--name-only", revision]
        names = self._git(*listing[:1], "-z", *listing[1:], "--", *paths).split("\0")
        return [name for name in names if name and (revision != WORKSPACE or (self.root / name).is_file())]

    def _ids(self, revision: str, paths: Sequence[str]) -> dict[str, str]:
        """Path -> id of the content, for those paths that git holds at a revision."""
        entries = self._git("ls-tree", "-z", revision, "--", *paths).split("\0") if paths else []
        pairs = (entry.split("\t", 1) for entry in entries if entry)
        return {path: fields.split()[2] for fields, path in pairs}

    def _git(self, *arguments: str) -> str:
        done = self.run("git", *arguments)
        if done.returncode:
            raise ConfigError(f"git {' '.join(arguments[:3])} ended with {done.returncode}:\n{_end(done.stderr)}")
        return done.stdout

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program that is installed beside this interpreter, or on the path."""
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
    """What a run that left no experiment amounts to: the exit code of its stage says it."""
    output = f"{_end(ended.output)}\nAll of its output is in {log}."
    codes = _EXIT_CODE.findall(ended.output)
    if ended.stopped or "interrupted:" in ended.output:
        return Interrupted(f"{name} was stopped; run the same command again, it resumes.\n{output}")
    if "Unable to acquire lock" in ended.output:
        return BusyError(f"{name}: another DVC command holds this repository; wait for it, run again.\n{output}")
    kind = _ERRORS.get(int(codes[-1]) if codes else 1, TrainingError)
    return kind(f"{name}: dvc exp run ended with {ended.code} and left no experiment:\n{output}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder}: a file is in the way. Expected a folder; move the file.") from error


def _end(output: str, lines: int = SHOWN_LINES) -> str:
    return "\n".join(output.strip().splitlines()[-lines:])
