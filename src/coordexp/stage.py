"""The frame around every stage: arguments, allocator, threads, logging, run record, exit codes."""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import logging
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coordexp.config.run import RunConfig
from coordexp.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    CoordExpError,
    Interrupted,
    TrainingError,
)
from coordexp.infra import DEVICE_VARIABLE
from coordexp.infra.printable import printable_output
from coordexp.infra.progress import StdoutHandler
from coordexp.infra.provenance import add_to_run_record, run_facts
from coordexp.infra.resume import mark, resume_root
from coordexp.infra.signals import interrupted_by_signals
from coordexp.infra.threads import set_threads
from coordexp.inputs import refuse_stale

LOG = logging.getLogger("coordexp")

# glibc malloc.h: parameter number and value. Freed blocks stay with the process. By default glibc returns large ones to
# the kernel, which zeroes them again at the next step; that dominates the time of CPU training.
MALLOPT = {
    "M_MMAP_THRESHOLD": (-3, 2**30),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}


# Errors of the disk, not of the program.
WRITE_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})


@dataclass(frozen=True, slots=True)
class AllocatorDecision:
    """Whether freed memory is kept, and why."""

    keeps_freed_memory: bool
    reason: str


def tune_allocator(log: logging.Logger) -> AllocatorDecision:
    """Make glibc keep freed blocks for reuse; do nothing with another C library. Logs the decision and the reason."""
    decision = _tune_allocator()
    action = "keeps freed memory" if decision.keeps_freed_memory else "untouched"
    log.info("allocator: %s (%s)", action, decision.reason)
    return decision


def _tune_allocator() -> AllocatorDecision:
    library, version = platform.libc_ver()
    if library != "glibc":
        return AllocatorDecision(False, f"the C library is {library or 'not glibc'}; the settings exist only in glibc")
    if chosen := sorted(name for name in os.environ if name.startswith("MALLOC_")):
        return AllocatorDecision(False, f"the environment sets {', '.join(chosen)}")
    libc = ctypes.CDLL(None)
    refused = [name for name, (number, value) in MALLOPT.items() if libc.mallopt(number, value) != 1]
    if refused:
        return AllocatorDecision(False, f"glibc {version} refused {', '.join(refused)}")
    return AllocatorDecision(True, f"glibc {version}: returning pages and zeroing them again costs more than the work")


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Exclude the objects of imports from garbage collection, now and at the end of the process.

    torch and transformers create a million objects that live as long as the process. Scanning them repeatedly during
    the import takes a fifth of the import time, and as much again at exit.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@printable_output()
def stage_main(run: Callable[..., None], argv: Sequence[str] | None = None, names: Sequence[str] = ()) -> int:
    """Run one stage as a process, write the record of the run, and return its exit code.

    A stage that exists once per name in `names` gets the name as its second argument.

    Errors that a user can fix become one message on stderr. The exit code is 2 for configuration, data and checkpoints,
    75 when interrupted with saved state, and 1 when training cannot continue. Any other error is a bug and keeps its
    traceback. Control characters in foreign names are escaped in the output.
    """
    gc.freeze()  # imported objects live as long as the process: collecting them at exit would take a second
    logging.basicConfig(handlers=[StdoutHandler()], format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    LOG.setLevel(logging.INFO)
    try:
        with interrupted_by_signals():
            _run_recorded(run, _parser(run.__doc__, names).parse_args(argv))
    except (Interrupted, KeyboardInterrupt) as error:
        mark(resume_root())
        why = str(error) or "stopped by a signal; run the same command again to resume."
        return _fail(f"interrupted: {why}", EXIT_INTERRUPTED)
    except TrainingError as error:
        return _fail(f"error: {error}", EXIT_BUG)
    except CoordExpError as error:
        return _fail(f"error: {error}", EXIT_USAGE)
    except OSError as error:
        if error.errno not in WRITE_FAULTS:
            raise
        return _fail(f"error: {_write_fault(error)}", EXIT_USAGE)
    return EXIT_DONE


def _write_fault(error: OSError) -> str:
    where = error.filename or "an output of this stage"
    before = (
        " DVC removed the previous outputs when it started this stage; `dvc checkout --force` restores those that are "
        "in dvc.lock."
        if "DVC_STAGE" in os.environ
        else ""
    )
    return (
        f"{where}: cannot be written: {error.strerror}. No incomplete output was left in place.{before} Free some disk "
        "space or make the folder writable, then run the same command again: it resumes from the last saved state."
    )


def _run_recorded(run: Callable[..., None], args: argparse.Namespace) -> None:
    """Run the stage and write its record; with several training processes, only the launching process writes it."""
    stage = _stage_name(run)
    context = _context(args, stage)
    record = context.paths.run_record(f"{stage}@{args.name}" if args.name else stage)
    is_of_graph = stage == "check" or (context.paths.inputs / f"{stage}.json").is_file()
    keeps_record = is_of_graph and "RANK" not in os.environ
    if keeps_record:
        record.unlink(missing_ok=True)
    started, cpu_before = time.monotonic(), _cpu_seconds()
    run(context, args.name) if args.name else run(context)
    if keeps_record:
        facts = run_facts(
            record.name.removesuffix(".run.json"), time.monotonic() - started, _cpu_seconds() - cpu_before
        )
        add_to_run_record(record, facts)


def _stage_name(run: Callable[..., None]) -> str:
    """The name of a stage comes from the file of its entry point."""
    code = getattr(run, "__code__", None)
    return Path(code.co_filename).stem.replace("_", "-") if code else ""


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _context(args: argparse.Namespace, stage: str) -> RunConfig:
    if args.device:
        os.environ[DEVICE_VARIABLE] = args.device  # child processes inherit it
    context = RunConfig.read(args.params, args.profile, args.out)
    if stage:
        refuse_stale(context, args.params.parent, stage)
    tune_allocator(LOG)
    set_threads(context.profile.launch.threads, LOG)
    if shutil.which("git") is None:
        LOG.warning("git is not installed: the record of this run will not contain the commit.")
    return context


def _parser(description: str | None, names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    if names:
        parser.add_argument("name", choices=names, help="name of the checkpoint")
    else:
        parser.set_defaults(name="")
    parser.add_argument("--profile", help="configs/<profile>.yaml (default: the `profile` of --params)")
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="parameter file (default: %(default)s)"
    )
    parser.add_argument(
        "--device", help=f"auto (a GPU if there is one), cpu, cuda or cuda:N (default: {DEVICE_VARIABLE} or auto)"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder of data/, runs/ and reports/ (default: .)")
    return parser


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
