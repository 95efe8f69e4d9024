"""Starting and ending a server of our own, with a stand-in for vLLM's interpreter."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from coordexp.errors import ConfigError, ServerError
from coordexp.rollout import vllm_server as subject
from coordexp.rollout.vllm_client import ServerPool
from coordexp.rollout.vllm_server import vllm_server
from helpers import tiny_pixels

# Serves as vLLM does, as far as keys go, with a worker beside it; says in `started.json` what it was given.
SERVES = """
import http.server, json, os, subprocess, sys
from pathlib import Path
port, key = int(sys.argv[sys.argv.index("--port") + 1]), os.environ["VLLM_API_KEY"]
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.path == "/health" or self.headers["Authorization"] == f"Bearer {key}"
        self.send_response(200 if allowed else 401)
        self.end_headers()
    do_POST = do_GET
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
told = {"pid": os.getpid(), "worker": worker.pid, "argv": sys.argv[1:]}
Path(__file__).with_name("started.json").write_text(json.dumps(told))
server.serve_forever()
"""


@pytest.fixture(autouse=True)
def _temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(subject, "POLL_SECONDS", 0.05)


def fake_python(folder: Path, body: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!{sys.executable} -IS\n{body}")  # without the start-up hook of vLLM's interpreter
    path.chmod(0o755)
    return path


def started(folder: Path) -> dict:
    return json.loads((folder / "started.json").read_text())


def checkpoint(folder: Path) -> Path:
    (folder / "checkpoint").mkdir(exist_ok=True)
    return folder / "checkpoint"


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(*pids: int) -> None:
    ends_at = time.monotonic() + 15
    while any(map(is_running, pids)):
        assert time.monotonic() < ends_at, [pid for pid in pids if is_running(pid)]
        time.sleep(0.05)


def test_a_server_lives_as_long_as_its_block(tmp_path: Path) -> None:
    with vllm_server(fake_python(tmp_path, SERVES), checkpoint(tmp_path), tiny_pixels(), 8) as server:
        told = started(tmp_path)
        assert is_running(told["pid"])
        # The key that the client sends is the one that the server asks for.
        assert ServerPool([server.url], 5, 1).ask(0, {}, bytes) == b""
        key = urllib.parse.urlsplit(server.url).password
        assert key
        assert key not in " ".join(told["argv"]) + repr(server)
        with pytest.raises(ServerError, match="HTTP 401"):
            ServerPool([server.url.replace(f":{key}@", "")], 5, 1).ask(0, {}, bytes)
    wait_until_gone(told["pid"], told["worker"], server.pid)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_only_a_server_for_constraints_gets_the_logits_processor(tmp_path: Path) -> None:
    for constrained in (True, False):
        with vllm_server(
            fake_python(tmp_path, SERVES), checkpoint(tmp_path), tiny_pixels(), 8, constrained=constrained
        ):
            argv = started(tmp_path)["argv"]
        assert ("--logits-processors" in argv) == ("--no-async-scheduling" in argv) == constrained


def test_a_killed_process_leaves_neither_server_nor_folder(tmp_path: Path) -> None:
    python = fake_python(tmp_path, SERVES)
    pid = os.fork()
    if pid == 0:
        with vllm_server(python, checkpoint(tmp_path), tiny_pixels(), 8) as server:
            (tmp_path / "up").write_text(str(server.pid))
            time.sleep(600)
    ends_at = time.monotonic() + 30
    while not (tmp_path / "up").is_file() or not (tmp_path / "up").read_text():
        assert time.monotonic() < ends_at
        time.sleep(0.05)
    told, leader = started(tmp_path), int((tmp_path / "up").read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until_gone(told["pid"], told["worker"], leader)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_server_that_ignores_sigterm_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "STOP_SECONDS", 0.2)
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVES
    with vllm_server(fake_python(tmp_path, deaf), checkpoint(tmp_path), tiny_pixels(), 8) as server:
        told = started(tmp_path)
    wait_until_gone(told["pid"], told["worker"], server.pid)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('no CUDA device'); raise SystemExit(3)", r"exited with code 3, .*\n.*no CUDA device"),
        ("import os; print('gone', flush=True); os.kill(os.getpid(), 9)", r"exited with code 137, .*\ngone"),
        ("print('\\x1b[31mred'); raise SystemExit(3)", r"\\x1b\[31mred"),
    ],
)
def test_a_server_that_does_not_come_up_says_why(tmp_path: Path, body: str, words: str) -> None:
    with (
        pytest.raises(ServerError, match=f"(?s){words}"),
        vllm_server(fake_python(tmp_path, body), checkpoint(tmp_path), tiny_pixels(), 8),
    ):
        pass
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_interpreter_that_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make vllm"), vllm_server(tmp_path / "no", tmp_path, tiny_pixels(), 8):
        pass
    python = fake_python(tmp_path, "")
    python.chmod(0o644)
    with (
        pytest.raises(ServerError, match="Permission denied"),
        vllm_server(python, checkpoint(tmp_path), tiny_pixels(), 8),
    ):
        pass


@pytest.mark.parametrize("seen", ["alive", "gone"])
def test_another_listener_on_the_port_is_not_taken_for_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    class Obliging(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    stranger = ThreadingHTTPServer(("127.0.0.1", 0), Obliging)
    threading.Thread(target=stranger.serve_forever, daemon=True).start()
    monkeypatch.setattr(subject, "_free_port", lambda: stranger.server_port)
    monkeypatch.setattr(subject, "STARTUP_SECONDS", 5.0 if seen == "gone" else 0.3)
    body = "import time; time.sleep(60)" if seen == "alive" else SERVES  # whose bind fails
    words = "is not up.*another" if seen == "alive" else "exited with code 1.*Address already in use"
    try:
        with (
            pytest.raises(ServerError, match=f"(?s){words}"),
            vllm_server(fake_python(tmp_path, body), checkpoint(tmp_path), tiny_pixels(), 8),
        ):
            pass
    finally:
        stranger.shutdown()
        stranger.server_close()
