"""The fault laboratory: every stage of a small graph is hit at each of its operations on files, and then run again.

    PYTHONPATH=src:.:tests python -m fault_lab [--stages pack report] [--sample 3] [--budget SECONDS]

The graph is that of the smoke profile with a dozen images and enough steps to memorize them, so that its model produces
valid answers and matching rollouts. It runs once undisturbed. Then, for each place, the workspace before the stage is
copied, and the stage runs with this one fault and afterwards, as DVC would do it, without: it must end with the bytes
of the undisturbed run.

All stages run in children of one process that has imported them, each in a separate workspace. A stage is a function
of its workspace: if a fault leaves the files that were there before the stage, or those that an earlier fault left, the
second run is known, and is not repeated. `--results` stores the results, so that a campaign stopped by its budget can
resume; `--report` writes a table of all known results.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, repeat, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

from coordexp.config.paths import CHECKPOINTS
from coordexp.infra.files import remove
from coordexp.infra.resume import LOCK
from coordexp.inputs import StageTable, stage_plans
from fault_shim import FAULTS, KINDS, SIGNALS, SOURCES, Fault, Shim
from workspaces import ANSWERING, PROFILE, REPOSITORY, content_hash, copy_workspace, new_workspace

FORK = multiprocessing.get_context("fork")
CHANGES = {**ANSWERING, "monitor.keep_every_steps": 5}  # two kept checkpoints have the places of five

ENDS_WITHIN_S, GONE_WITHIN_S = 900.0, 10.0
OUTCOMES = ("unmet", "unharmed", "named", "killed", "silent", "traceback", "hung", "lingering", "lost")
RIGHT = {"unmet", "unharmed", "named", "killed"}
MADE_BY = (
    "Made by `make test-faults`. Each stage of a small graph whose model answers met a fault at one of its operations "
    "on files, for each of these in turn ({}), and was then run again, as `dvc repro` would. Sources are no such "
    "files. Of a file that is read in many pieces, the pieces 1, 2, 4, 8, ... were tried."
)
MEANINGS = {
    "unmet": "there were fewer such operations this time: how often states are saved depends on the time",
    "unharmed": "the stage ended well, with the right outputs",
    "named": "it ended with one message and an exit code of its own; run again, it made the right outputs",
    "killed": "it was killed; run again, it made the right outputs",
    "silent": "it ended well with other outputs",
    "traceback": "it ended in a traceback; run again, it made the right outputs",
    "hung": "it did not end",
    "lingering": "processes that it started were still there after it",
    "lost": "run again, it failed or made other outputs",
}


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of one fault in one stage: the affected file, one of OUTCOMES, and the last line of output."""

    stage: str
    kind: str
    number: int
    what: str
    where: str
    outcome: str
    said: str

    @property
    def place(self) -> tuple[str, str, int, str]:
        """The identifier of the fault."""
        return self.stage, self.kind, self.number, self.what


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run of a stage ended: exit code (negative: a signal, None: not at all), output, the file where it met its
    fault, the operations that it made, and how many processes were left of it."""

    code: int | None
    output: str
    met: str
    places: list[tuple[str, str]]
    left: int = 0


class Lab:
    """Undisturbed workspaces before each stage, and the results of the stages."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.plans = stage_plans(REPOSITORY, PROFILE)
        self._made: dict[str, str] = {}  # hash of the outputs by stage
        self.operations: dict[str, list[tuple[str, str]]] = {}
        self._before: dict[str, Path] = {}
        self._recovers: dict[tuple[str, str], bool] = {}  # whether a stage makes its outputs from files with this hash
        self._runs = 0

    def prepare(self, stages: Collection[str]) -> None:
        """Run the graph undisturbed as far as the last of the stages."""
        space = self._root / "graph"
        new_workspace(space, {}, CHANGES)
        left = set(stages)
        for stage in self.plans:
            self._before[stage] = self._root / f"before-{stage}"
            if stage in left:
                copy_workspace(space, self._before[stage])
            ended = self.run(space, stage)
            assert ended.code == 0, f"{stage}, undisturbed, ended with {ended.code}:\n{ended.output[-3000:]}"
            self._made[stage], self.operations[stage] = self._content(space, stage), ended.places
            left.discard(stage)
            if not left:
                return

    def faults(self, stage: str, sample: int = 0, kinds: Collection[str] = KINDS) -> Iterator[Fault]:
        """Every place of a stage, or `sample` of them per kind and fault, spread over the run."""
        counts = Counter(kind for kind, _ in self.operations[stage])
        for kind in kinds:
            for what in FAULTS[kind]:
                numbers = range(1, counts[kind] + 1)
                spread = {numbers[(2 * i + 1) * len(numbers) // (2 * sample)] for i in range(sample)} if numbers else ()
                chosen = sorted(spread) if sample else numbers
                yield from (Fault(kind, number, what) for number in chosen)

    def attempt(self, stage: str, fault: Fault) -> Found:
        """Run a stage with a fault, and again without."""
        space = self._root / f"attempt-{os.getpid()}"
        remove(space)
        copy_workspace(self._before[stage], space)
        self._recovers.setdefault((stage, files_hash(space)), True)  # as `prepare` has shown
        hit = self.run(space, stage, fault)
        where, outcome = hit.met, self._judge(space, stage, hit, fault)
        if outcome in RIGHT or outcome == "traceback":
            left = stage, files_hash(space)
            if not self._recovers.get(left):
                again = self.run(space, stage)
                right = again.code == 0 and self._content(space, stage) == self._made[stage] and not litter(space)
                self._recovers[left] = right
                if not right:
                    outcome, hit = "lost", again
        said = [line for line in hit.output.splitlines() if line.strip()]
        return Found(stage, fault.kind, fault.number, fault.what, where, outcome, said[-1][:200] if said else "")

    def _judge(self, space: Path, stage: str, hit: Ended, fault: Fault) -> str:
        if hit.code is None:
            return "hung"
        if hit.left:
            return "lingering"
        if hit.code == 0 and not hit.met:
            return "unmet"
        if hit.code == 0:
            return "unharmed" if self._content(space, stage) == self._made[stage] else "silent"
        if hit.code == -SIGNALS.get(fault.what, 0) and hit.met:
            return "killed"
        is_named = re.search(r"(?m)^(error|interrupted): ", hit.output) and "Traceback (most" not in hit.output
        return "named" if is_named and hit.code in (1, 2, 75) else "traceback"

    def _content(self, space: Path, stage: str) -> str:
        return " ".join(f"{path}={content_hash(space / path)}" for path in sorted(self.plans[stage].outs))

    def run(self, space: Path, stage: str, fault: Fault | None = None) -> Ended:
        """Run a stage in a child of this process, after removing its outputs, as DVC does."""
        if stage != "check":  # whose outputs persist
            for path in self.plans[stage].outs:
                remove(space / path)
        self._runs += 1
        output, places = (self._root / f"{name}-{os.getpid()}-{self._runs}" for name in ("output", "places"))
        pid = os.fork()
        if pid == 0:
            _child(space, stage, fault, output, places)
        code, left = _wait(pid), _end_session(pid)
        text = output.read_text(encoding="utf-8", errors="replace")
        mark = places.with_suffix(".met")
        met = mark.read_text() if mark.exists() else ""
        known = json.loads(places.read_text()) if places.exists() else []
        for file in (output, places, mark):
            file.unlink(missing_ok=True)
        return Ended(code, text, met, [(kind, path) for kind, path in known], left)


def _child(space: Path, stage: str, fault: Fault | None, output: Path, places: Path) -> None:
    """Be the process of a stage; does not return."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
        sink = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(sink, stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1) for stream in (1, 2))  # noqa: SIM115
        os.chdir(space)
        shim = Shim(str(space.resolve()), fault, places.with_suffix(".met").write_text)
        shim.install()
        entry, _, which = stage.partition("@")
        from coordexp.stage import stage_main

        run = importlib.import_module(f"pipelines.{entry.replace('-', '_')}").run
        code = stage_main(run, [which] if which else [], CHECKPOINTS if which else ())
        places.write_text(json.dumps(shim.places))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # as an interpreter does at its end
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int) -> int | None:
    """The exit code of a child, negative for a signal; None if it had to be ended."""
    ends_at = time.monotonic() + ENDS_WITHIN_S
    while time.monotonic() < ends_at:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _end_session(leader: int) -> int:
    """Kill the processes of a session that remain after some time; returns their number."""
    ends_at = time.monotonic() + GONE_WITHIN_S
    while left := _members(leader):
        if time.monotonic() > ends_at:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return len(left)
        time.sleep(0.05)
    return 0


def _members(session: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def sources_hash() -> str:
    """Hash of all sources that a campaign runs, including this one."""
    run = [REPOSITORY / name for name in ("src", "pipelines", "params.yaml", f"configs/{PROFILE}.yaml")]
    own = [Path(__file__).with_name(name) for name in ("fault_lab.py", "fault_shim.py", "workspaces.py")]
    return hashlib.sha256("".join(map(content_hash, [*run, *own])).encode()).hexdigest()[:12]


def files_hash(space: Path) -> str:
    """Hash of all that a stage may find in a workspace: names and contents, without sources and holders of locks."""
    digest = hashlib.sha256()
    for path in sorted(space.rglob("*")):
        name = path.relative_to(space)
        if name.parts[0] not in SOURCES:
            content = content_hash(path) if path.is_file() and path.name != LOCK else ""
            digest.update(f"{name}:{content}\n".encode())
    return digest.hexdigest()


def litter(space: Path) -> list[Path]:
    """Incomplete files and folders left by a run."""
    return [path for folder in ("data", "inputs", "reports", "runs") for path in (space / folder).rglob(".*.tmp")]


def import_stages(stages: Collection[str]) -> None:
    """All that these stages load before or while they work, once, without starting threads: children will be forked."""
    for stage in stages:
        importlib.import_module(f"pipelines.{stage.partition('@')[0].replace('-', '_')}")
    for name in ("pyarrow.parquet", "safetensors.torch", "matplotlib.figure", "PIL.PngImagePlugin"):
        importlib.import_module(name)
    StageTable.of(REPOSITORY)  # parses all sources, which the stages then find parsed


def campaign(lab: Lab, places: Sequence[tuple[str, Fault]], ends_at: float, results: Path) -> None:
    """Try these places in order until the time is over, and add what is found to a file."""
    for stage, fault in places:
        if time.monotonic() >= ends_at:
            return
        found = lab.attempt(stage, fault)
        with results.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(found)) + "\n")
        print(*asdict(found).values(), sep="  ", flush=True)


def divide(lab: Lab, places: Sequence[tuple[str, Fault]], jobs: int, budget_s: float, results: Path) -> None:
    """Run a campaign in several processes; RuntimeError if one of them fails."""
    ends_at = time.monotonic() + budget_s
    processes = [FORK.Process(target=campaign, args=(lab, places[n::jobs], ends_at, results)) for n in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"{len(failed)} of {jobs} processes of the campaign failed ({failed}): see above.")


def read_results(path: Path) -> list[Found]:
    """The results of earlier campaigns."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Found(**json.loads(line)) for line in lines]


def report(found: Sequence[Found], totals: Mapping[str, int]) -> str:
    """The table of a campaign in Markdown: places by stage, outcomes, and each failure."""
    from coordexp.reporting.markdown import escape, table

    rows = []
    for stage, total in totals.items():
        counts = Counter(one.outcome for one in found if one.stage == stage)
        rows.append([escape(stage), str(total), str(counts.total()), *(str(counts[outcome]) for outcome in OUTCOMES)])
    sums = [str(sum(int(row[column]) for row in rows)) for column in range(1, len(OUTCOMES) + 3)]
    wrong = [
        f"- {one.stage}, {one.kind} {one.number} ({escape(one.where)}), {one.what}: {one.outcome}: {escape(one.said)}"
        for one in found
        if one.outcome not in RIGHT
    ]
    return (
        "\n\n".join(
            [
                "# Faults",
                MADE_BY.format("; ".join(f"{kind}: {', '.join(whats)}" for kind, whats in FAULTS.items())),
                table(["stage", "places", "tried", *OUTCOMES], [*rows, ["all", *sums]]),
                "\n".join(f"- {outcome}: {meaning}" for outcome, meaning in MEANINGS.items()),
                "What went wrong:" if wrong else "Nothing went wrong.",
                *(["\n".join(wrong)] if wrong else []),
            ]
        )
        + "\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign; exit code 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = list(stage_plans(REPOSITORY, PROFILE))
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, help="default: all", metavar="STAGE")
    parser.add_argument("--sample", type=int, default=0, help="places of each kind in a stage; 0 is all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of operations; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes that divide the places among them")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no place is begun")
    parser.add_argument(
        "--results", type=Path, help="folder that keeps what was found; known places are not tried again"
    )
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    options = parser.parse_args(argv)
    chosen = [stage for stage in stages if stage in options.stages]
    import_stages(chosen)
    with TemporaryDirectory(prefix="faults-") as folder:
        lab = Lab(Path(folder).resolve())
        lab.prepare(chosen)
        results = options.results or Path(folder)
        results.mkdir(parents=True, exist_ok=True)
        results /= f"faults-{sources_hash()}.jsonl"  # what other sources did is not what these do
        known = {found.place for found in read_results(results)}
        # One place of each stage in turns, so that a short budget reaches all stages.
        turns = zip_longest(*(zip(repeat(stage), lab.faults(stage, options.sample, options.kinds)) for stage in chosen))
        places = [(s, f) for s, f in filter(None, chain(*turns)) if (s, f.kind, f.number, f.what) not in known]
        divide(lab, places, options.jobs, options.budget, results)
        found = read_results(results)
        totals = {stage: sum(1 for _ in lab.faults(stage)) for stage in chosen}
    text = report(found, totals)
    if options.report:
        options.report.write_text(text, encoding="utf-8")
    print(text)
    return int(any(one.outcome not in RIGHT for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
