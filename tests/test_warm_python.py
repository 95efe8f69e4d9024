"""Except for loaded libraries, a forked program behaves as in a fresh interpreter; other programs are not forked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import warm_python
from coordexp.infra.threads import SPIN_ROUNDS

SHOW = """
import atexit, json, os, random, resource, sys, numpy
atexit.register(print, "at the end")
print(json.dumps({
    "arguments": sys.argv, "name": __name__, "file": __file__, "folder": os.getcwd(), "path": sys.path,
    "variable": os.environ.get("DVC_STAGE"), "input": sys.stdin.read(), "umask": os.umask(0),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "drawn": [random.random(), numpy.random.rand()],
    "warm": "torch" in sys.modules, "ours": [m for m in sys.modules if m.split(".")[0] in ("coordexp", "pipelines")],
    "parts": len(os.listdir("/proc/self/task")), "pid": os.getpid(),
}))
print("complaint", file=sys.stderr)
sys.exit(7)
"""
NEVER_THE_SAME = ("warm", "drawn", "pid")


@pytest.fixture
def environment(warm: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of programs that may be forked."""
    path = f"{warm}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}


def shown(program: list[str], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """The program's report about itself."""
    done = subprocess.run(
        ["bash", "-c", 'umask 027; ulimit -n 200; exec "$@"', "bash", *program],
        cwd=folder, env=environment, input="given", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (7, "complaint\n")
    said, last = done.stdout.splitlines()
    assert last == "at the end"
    return json.loads(said)


def test_modules_and_files_run_as_in_a_fresh_interpreter(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "src" / "room").mkdir(parents=True)
    (tmp_path / "src" / "room" / "show.py").write_text(SHOW)
    (tmp_path / "show.py").write_text(SHOW)
    environment |= {"PYTHONPATH": "src", "DVC_STAGE": "x"}
    for program in (["-m", "room.show", "--a", "b c"], ["show.py", "d"], ["-u", str(tmp_path / "show.py")]):
        forked = [shown(["python", *program], environment, tmp_path) for _ in range(2)]
        alone = shown([sys.executable, *program], environment, tmp_path)
        assert [forked[0]["warm"], alone["warm"]] == [True, False]
        assert {k: v for k, v in forked[0].items() if k not in NEVER_THE_SAME} == {
            k: v for k, v in alone.items() if k not in NEVER_THE_SAME
        }
        assert (alone["ours"], alone["parts"], alone["umask"], alone["files"]) == ([], 1, 0o027, 200)
        assert not set(forked[0]["drawn"]) & set(forked[1]["drawn"])
        assert forked[0]["pid"] != forked[1]["pid"]


def test_changed_environment_or_options_start_a_fresh_interpreter(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import sys\nprint('torch' in sys.modules)\n")

    def is_warm(*program: str, **more: str) -> bool:
        done = subprocess.run(program, cwd=tmp_path, env=environment | more, capture_output=True, text=True, check=True)
        return done.stdout == "True\n"

    assert is_warm("python", "x.py")
    assert is_warm("python", "x.py", GOMP_SPINCOUNT=SPIN_ROUNDS)  # what the package sets itself
    assert is_warm("python", "x.py", PYTHONUNBUFFERED="1")
    assert not is_warm("python", "x.py", OMP_NUM_THREADS="2")
    assert not is_warm("python", "x.py", HF_HOME="elsewhere")
    assert not is_warm("python", "x.py", PYTHONHASHSEED="0")
    assert not is_warm("python", "-X", "dev", "x.py")
    assert not is_warm("python", "-c", "import sys; print('torch' in sys.modules)")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import os; os._exit(3)", 3, ""),
    ],
)
def test_every_way_to_exit_is_passed_on(
    environment: dict[str, str], tmp_path: Path, text: str, code: int, words: str
) -> None:
    (tmp_path / "x.py").write_text(text)
    done = subprocess.run(
        ["python", "x.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr.endswith(words)


def test_unbuffered_output_arrives_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "import os, sys\nprint('here', end='')\nprint('there', end='', file=sys.stderr)\nos._exit(0)\n"
    )
    for program, more in ((["python", "-u", "x.py"], {}), (["python", "x.py"], {"PYTHONUNBUFFERED": "1"})):
        done = subprocess.run(program, cwd=tmp_path, env=environment | more, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("here", "there")


def test_signals_reach_the_program_and_it_dies_with_its_caller(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "import os, time\nfrom pathlib import Path\nPath(f'pid').write_text(str(os.getpid()))\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    raise SystemExit(75)\n"
    )
    for number, code in ((signal.SIGINT, 75), (signal.SIGTERM, -15), (signal.SIGKILL, -9)):
        pid = tmp_path / "pid"
        pid.unlink(missing_ok=True)
        with subprocess.Popen(["python", "x.py"], cwd=tmp_path, env=environment) as process:
            while not (pid.is_file() and pid.read_text()):
                time.sleep(0.02)
            time.sleep(0.2)
            process.send_signal(number)
            assert process.wait() == code
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid.read_text()}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_programs_may_begin_and_end_at_the_same_time(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import sys\nprint('here')\nsys.exit(int(sys.argv[1]))\n")

    def run(number: int) -> tuple[int, str]:
        command = ["python", "x.py", str(number)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(40))) == [(number, "here\n") for number in range(40)]


def test_without_the_server_programs_start_a_fresh_interpreter(tmp_path: Path) -> None:
    """Here the server exits at once, because the process that it waits for has ended."""
    with subprocess.Popen(["true"]) as gone:
        pass
    folder = tmp_path / "warm"
    folder.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    bin_folder = warm_python.warm_path(folder, environment, gone.pid, libraries=())
    (tmp_path / "x.py").write_text("print('here')")
    path = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    for _ in range(2):
        done = subprocess.run(
            ["python", "x.py"], cwd=tmp_path, env=environment | path, capture_output=True, text=True, check=True
        )
        assert done.stdout == "here\n"
