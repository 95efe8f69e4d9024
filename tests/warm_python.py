"""Python programs as processes of their own, without importing torch and transformers again: a server that forks.

A stage imports libraries for seconds before it works, and DVC for most of one. `warm_path` starts a server that has
imported LIBRARIES, and makes a folder for the front of a path with a `python`, a `dvc` and a `coordexp`: `python -m
module`, `python file.py` and those two then run in a process that was forked from the server. Nothing of this
repository is imported there, and no program has run in it. Arguments, environment, folder, standard streams, limits,
umask, signals, exit code and `sys.path` are those of the caller, and random numbers are seeded anew. All such programs
share the seed of hashes. Whatever asks for more is run by the interpreter itself: other options, or an environment that
differs from the server's in variables other than FREE, which a library might have read when it was imported.

    python warm_python.py serve SOCKET PID LIBRARY ...      until the process PID ends
    python -IS warm_python.py ask SOCKET SERVER PYTHON ARGUMENT ...
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

# What only the others need, they import themselves: a suite asks hundreds of times.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    import pytest

    Program = dict[str, Any]

# Of what matplotlib reads in HOME, there is nothing in the tests' home folders.
LIBRARIES = (
    *("torch", "torch.distributed.fsdp", "torch.distributed.launcher.api", "torch._dynamo", "numpy", "scipy.optimize"),
    *("PIL.Image", "ruamel.yaml", "jinja2", "safetensors.torch", "tokenizers", "transformers"),
    *("pydantic.main", "pydantic.dataclasses", "pyarrow.dataset", "pandas", "matplotlib.figure", "networkx", "hydra"),
    *(
        "transformers.models.qwen3_vl.modeling_qwen3_vl",
        "dvc.cli.parser",
        "dvc.repo",
        "dvc.stage.loader",
        "dvc.fs.data",
    ),
    *("dvc.repo.experiments.queue.tempdir", "dvc.repo.experiments.queue.celery"),
)
# What no library reads when it is imported, by name or beginning.
FREE = ("HOME", "PWD", "OLDPWD", "SHLVL", "_", "PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "COLUMNS", "LINES")
FREE += ("RANK", "WORLD_SIZE", "MFLAGS", "TORCHINDUCTOR_CACHE_DIR")
FREE_BEGINNINGS = ("DVC_", "GIT_", "MAKE", "PYTEST_", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
FREE_BEGINNINGS += ("TORCH_NCCL_", "TOY_")
# What the package, or the interpreter, sets itself before a library is imported.
ALWAYS = {"GOMP_SPINCOUNT": "2000", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "LC_CTYPE": "C.UTF-8"}
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def program_of(arguments: list[str]) -> Program | None:
    """What an interpreter with these arguments would run, if it is a module or a file."""
    unbuffered = arguments[:1] == ["-u"]
    match arguments[1:] if unbuffered else arguments:
        case ["-m", module, *rest]:
            return {"module": module, "arguments": rest, "unbuffered": unbuffered}
        case [file, *rest] if file.endswith(".py"):
            return {"file": file, "arguments": rest, "unbuffered": unbuffered}
    return None


def warm_path(folder: Path, environment: Mapping[str, str], until: int, libraries: Sequence[str] = LIBRARIES) -> Path:
    """Start a server in an empty folder; returns the folder of its `python`, for the front of a path.

    The server ends with the process `until`. Where it cannot run, each program gets an interpreter of its own.
    """
    import shlex
    import subprocess

    place, bin_folder = folder / "socket", folder / "bin"
    bin_folder.mkdir()
    command = [sys.executable, __file__, "serve", str(place), str(until), *libraries]
    with (folder / "log").open("w", encoding="utf-8") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        server = subprocess.Popen(command, cwd=folder, env=ALWAYS | environment, start_new_session=True, **streams)
    asking = shlex.join([sys.executable, "-IS", __file__, "ask", str(place), str(server.pid), sys.executable])
    for name, arguments in (("python", ""), ("dvc", "-m dvc "), ("coordexp", "-m coordexp.cli ")):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {asking} {arguments}"$@"\n', encoding="utf-8")
        (bin_folder / name).chmod(0o755)
    return bin_folder


def enter(patch: pytest.MonkeyPatch, environment: Mapping[str, str], warm: Path) -> None:
    """Give this process this environment and no more, so that what it starts is forked, also beside its interpreter."""
    for name in os.environ.keys() - environment.keys():
        if not name.startswith("PYTEST_"):
            patch.delenv(name)
    for name, value in environment.items():
        patch.setenv(name, value)
    patch.setattr(sys, "executable", str(warm / "python"))


# The program `python`: asks the server, and ends as the program that it forked.


def ask(place: str, server: str, python: str, arguments: list[str]) -> None:
    """Run a program in a fork of the server, or replace this process by the interpreter."""
    program = program_of(arguments)
    connection = _connect(place, server) if program else None
    if connection is not None:
        program |= {"environment": dict(os.environ), "folder": os.getcwd(), "limits": _limits(), "umask": _umask()}
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        _send(connection, program)
        if answer := connection.recv(8):  # nothing: it was refused
            _end_as(struct.unpack("q", answer)[0])
    os.execv(python, [python, *arguments])


def _connect(place: str, server: str) -> socket.socket | None:
    """None if the server has ended, or ends before it is ready."""
    while _lives(server):
        connection = socket.socket(socket.AF_UNIX)
        with suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(place)
            return connection
        time.sleep(0.02)
    return None


def _lives(process: str) -> bool:
    with suppress(FileNotFoundError), open(f"/proc/{process}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False


def _send(connection: socket.socket, program: Program) -> None:
    content = json.dumps(program).encode()
    socket.send_fds(connection, [struct.pack("q", len(content))], [0, 1, 2])
    connection.sendall(content)


def _limits() -> dict[str, list[int]]:
    import resource

    return {name: list(resource.getrlimit(getattr(resource, name))) for name in dir(resource) if "RLIMIT_" in name}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _end_as(code: int) -> None:
    """End with an exit code, or by the signal -code."""
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# The server: a process that forks one for each program, and reports its end to the process that asked.


def serve(place: str, until: int, libraries: Sequence[str]) -> None:
    """Import, then fork for each request; returns in a forked process, with its PROGRAM, and after `until`."""
    import gc
    import importlib

    gc.disable()
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # or pyarrow starts a thread; no program sees it
    for name in libraries:
        importlib.import_module(name)
    _leave_at_exit()
    gc.freeze()
    gc.enable()
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("a library has started threads, which would be missing in a fork")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{place}.new")
    listener.listen(64)
    os.rename(f"{place}.new", place)
    _fork_programs(listener, os.pidfd_open(until))
    if not PROGRAM:
        with suppress(FileNotFoundError):  # pytest may have removed the folder
            os.unlink(place)


def _fork_programs(listener: socket.socket, until: int) -> None:
    """Fork a program for each connection and report its end there; returns as `serve` does."""
    import select

    programs: dict[socket.socket, int] = {}  # to each connection the pidfd of its program, 0 before it runs
    waiting = [listener, until]
    while waiting or programs:
        readable, *_ = select.select([*waiting, *programs, *filter(None, programs.values())], [], [])
        if until in readable:
            waiting = []
        elif listener in readable:
            programs[listener.accept()[0]] = 0
        for connection, running in list(programs.items()):
            if running in readable:
                _report(connection, running)
            elif connection in readable and running:
                for number in connection.recv(16) or [signal.SIGKILL]:  # nothing: whoever asked is dead
                    signal.pidfd_send_signal(running, number)
            elif connection in readable:
                programs[connection] = _fork(connection, [listener, until, *programs, *filter(None, programs.values())])
                if PROGRAM:
                    return
            programs = {asked: number for asked, number in programs.items() if asked.fileno() >= 0}  # the open ones


def _fork(connection: socket.socket, ours: list[socket.socket | int]) -> int:
    """The pidfd of the program that was asked for; 0 if none is forked, and in the program, which closes `ours`."""
    request = _request(connection)
    if request is None:
        connection.close()
        return 0
    program, streams = request
    if child := os.fork():
        for stream in streams:
            os.close(stream)
        return os.pidfd_open(child)
    for one in ours:
        os.close(one if isinstance(one, int) else one.detach())
    os.setsid()
    _become(program, streams)
    return 0


def _leave_at_exit() -> None:
    """At its end, no program takes down what the libraries have set up: that would copy all of it.

    Of torch, these are 175 registries of operators, and a table of what was compiled, for a log that nobody reads.
    """
    import atexit
    import weakref

    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False
    if "torch._dynamo.utils" in sys.modules:
        atexit.unregister(sys.modules["torch._dynamo.utils"].dump_compile_times)


def _request(connection: socket.socket) -> tuple[Program, list[int]] | None:
    """The program and its standard streams; None if it must not be forked, or if whoever asked is dead."""
    head, streams, *_ = socket.recv_fds(connection, 8, 3)
    if len(head) < 8:
        return None
    size = struct.unpack("q", head)[0]
    content = b""
    while len(content) < size and (part := connection.recv(size - len(content))):
        content += part
    program = json.loads(content)
    if refused := _read_when_imported(program["environment"]):
        print(f"not forked because of {', '.join(refused)}: {program['arguments']}", file=sys.stderr, flush=True)
        for stream in streams:
            os.close(stream)
        return None
    return program, streams


def _report(connection: socket.socket, ended: int) -> None:
    """Send the exit code of a program that has ended, or -n after signal n."""
    found = os.waitid(os.P_PIDFD, ended, os.WEXITED)
    os.close(ended)
    with connection, suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(struct.pack("q", found.si_status if found.si_code == os.CLD_EXITED else -found.si_status))


def _read_when_imported(environment: dict[str, str]) -> list[str]:
    """The variables that differ from the server's and that a library may have read."""
    changed = {name for name, _ in (ALWAYS | environment).items() ^ (ALWAYS | FIRST_ENVIRONMENT).items()}
    return sorted(name for name in changed if name not in FREE and not name.startswith(FREE_BEGINNINGS))


def _become(program: Program, streams: list[int]) -> None:
    """Take over everything of the process that asked, but for its identity."""
    import io
    import random
    import resource

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(program["folder"])
    os.umask(program["umask"])
    for name, limit in program["limits"].items():
        resource.setrlimit(getattr(resource, name), tuple(limit))
    os.environ.clear()
    os.environ.update(program["environment"])
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if program["unbuffered"] or os.environ.get("PYTHONUNBUFFERED"):
        for number, name in ((1, "stdout"), (2, "stderr")):  # the first objects stay, as sys.__stdout__
            first, raw = getattr(sys, name), io.FileIO(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, first.encoding, first.errors, write_through=True))
    is_module = "module" in program
    first = program["folder"] if is_module else os.path.dirname(os.path.abspath(program["file"]))
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [first, *(os.path.abspath(folder) for folder in given), *LIBRARY_PATH]
    sys.argv = [program.get("file", "-m"), *program["arguments"]]
    started = [*["-u"] * program["unbuffered"], *(["-m", program["module"]] if is_module else [program["file"]])]
    sys.executable = PYTHON
    sys.orig_argv = [PYTHON, *started, *program["arguments"]]
    PROGRAM.update(program)


def _run(program: Program) -> int:
    """Run it as the main module; returns its exit code, or the signal that it ends by as a negative number."""
    import runpy
    import types

    main_module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        if "module" in program:
            runpy._run_module_as_main(program["module"])  # what the interpreter calls for -m
        else:
            main_module.__file__ = os.path.abspath(program["file"])
            with open(main_module.__file__, "rb") as source:
                exec(compile(source.read(), main_module.__file__, "exec", dont_inherit=True), main_module.__dict__)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException as error:  # as the interpreter does
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(code: int) -> None:
    """End as an interpreter does, but leave the libraries in memory: taking them down would copy all of it."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _end_as(code)


PROGRAM: Program = {}  # in a forked process
PYTHON = ""  # what programs know as their interpreter: the one that asks the server
LIBRARY_PATH: list[str] = []
FIRST_ENVIRONMENT: dict[str, str] = {}  # of the server, before libraries add to it


def main() -> None:
    """Ask or serve; a forked program runs at the bottom of the stack."""
    role, place, *rest = sys.argv[1:]
    if role == "ask":
        ask(place, rest[0], rest[1], rest[2:])
    global PYTHON
    PYTHON = os.path.join(os.path.dirname(place), "bin", "python")
    LIBRARY_PATH.extend(sys.path[1:])
    FIRST_ENVIRONMENT.update(os.environ)
    serve(place, int(rest[0]), rest[1:])
    if PROGRAM:
        _end(_run(PROGRAM))


if __name__ == "__main__":
    main()
