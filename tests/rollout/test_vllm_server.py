"""Starting and ending a server of our own, with a stand-in for vLLM's interpreter."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import urllib.parse
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from coordexp.config.profile import RolloutConfig
from coordexp.config.run import RunConfig
from coordexp.config.schema import DecodeParams
from coordexp.errors import ConfigError, ServerError
from coordexp.rollout import vllm_server as subject
from coordexp.rollout.serve import print_commands, run_servers
from coordexp.rollout.stages import asked_format
from coordexp.rollout.vllm_client import ServerPool
from coordexp.rollout.vllm_command import ServerCommand, Weights, device_groups, server_commands
from coordexp.rollout.vllm_http import KEY_VARIABLE
from coordexp.rollout.vllm_server import VllmServer, vllm_servers
from helpers import decode_request, rollout_config, tiny_pixels

# Serves as vLLM does, as far as keys go, with a worker beside it; says in `started-PORT.json` what it was given.
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
told = {"pid": os.getpid(), "worker": worker.pid, "argv": sys.argv[1:], "environment": dict(os.environ)}
Path(__file__).with_name(f"started-{port}.json").write_text(json.dumps(told))
server.serve_forever()
"""


@pytest.fixture(autouse=True)
def _temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(subject, "POLL_SECONDS", 0.05)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def fake_python(folder: Path, body: str, gpus: str = "0") -> Path:
    """An interpreter that answers the question for its GPUs, and runs `body` as a server."""
    path = folder / "python"
    probed = f"import sys\nif sys.argv[1] == '-c':\n    print({gpus!r})\n    raise SystemExit\n"
    path.write_text(f"#!{sys.executable} -IS\n{probed}{body}")  # without the start-up hook of vLLM's interpreter
    path.chmod(0o755)
    return path


def started(server: VllmServer, folder: Path) -> dict:
    return json.loads((folder / f"started-{urllib.parse.urlsplit(server.url).port}.json").read_text())


def commands(python: Path, decode: DecodeParams | None = None, **serve: Any) -> list[ServerCommand]:
    """What serves a folder without weights, by default one server on the CPU."""
    rollout = rollout_config(vllm_python=str(python), **serve)
    weights = Weights(python.parent / "checkpoint", "coordexp-0")
    return server_commands(rollout, weights, tiny_pixels(), decode or decode_request(max_new_tokens=8).params)


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


def test_a_server_runs_as_long_as_its_block(tmp_path: Path) -> None:
    with vllm_servers(commands(fake_python(tmp_path, SERVES))) as [server]:
        told = started(server, tmp_path)
        assert is_running(told["pid"])
        # The key that the client sends is the one that the server asks for.
        assert pool(server.url).ask(0, {}, bytes) == b""
        key = urllib.parse.urlsplit(server.url).password
        assert key
        assert key not in " ".join(told["argv"]) + repr(server)
        with pytest.raises(ServerError, match="HTTP 401"):
            pool(server.url.replace(f":{key}@", "")).ask(0, {}, bytes)
    wait_until_gone(told["pid"], told["worker"], server.process.pid)
    assert list((tmp_path / "tmp").iterdir()) == []


def pool(url: str) -> ServerPool:
    return ServerPool([url], 5, 1, Weights(Path("checkpoint"), "coordexp-0"))


def test_there_is_one_server_per_group_of_devices_of_its_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever our own torch sees; and each server has a key of its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    python = fake_python(tmp_path, SERVES, gpus="4")
    with vllm_servers(commands(python, tensor_parallel=2, gpu_memory_utilization=0.5)) as servers:
        told = [started(server, tmp_path) for server in servers]
        assert len({urllib.parse.urlsplit(server.url).password for server in servers}) == 2
    assert [one["environment"]["CUDA_VISIBLE_DEVICES"] for one in told] == ["2,3", "5,7"]
    for one in told:
        argv = " ".join(one["argv"])
        assert "--dtype bfloat16 --tensor-parallel-size 2 --gpu-memory-utilization 0.5" in argv
        assert "--enforce-eager" not in argv
    wait_until_gone(*(one[name] for one in told for name in ("pid", "worker")))


def test_a_server_does_not_inherit_the_training_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look for the others of a world that it is not in."""
    launched = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "ROLE_NAME", "TORCHELASTIC_USE_AGENT_STORE")
    for name in launched:
        monkeypatch.setenv(name, "1")
    with vllm_servers(commands(fake_python(tmp_path, SERVES))) as [server]:
        assert not started(server, tmp_path)["environment"].keys() & set(launched)


@pytest.mark.parametrize(
    ("serve", "gpus", "groups"),
    [
        ({}, 0, [("cpu",)]),
        ({"devices": "cpu, cpu"}, 0, [("cpu",), ("cpu",)]),
        ({"devices": "cpu"}, 2, [("cpu",)]),
        ({}, 2, [("0",), ("1",)]),
        ({"devices": "1"}, 2, [("1",)]),
        ({"devices": "1,2"}, 2, "names 2, but .* detects 0, 1"),
        ({"devices": "0"}, 0, "detects no GPU"),
        ({"tensor_parallel": 2}, 3, "3 devices .* tensor_parallel 2"),
    ],
)
def test_devices_are_grouped_or_refused(serve: dict[str, Any], gpus: int, groups: list | str) -> None:
    config, visible = rollout_config(**serve).serve, [str(i) for i in range(gpus)]
    if isinstance(groups, str):
        with pytest.raises(ConfigError, match=groups):
            device_groups(config, visible)
    else:
        assert device_groups(config, visible) == groups


def test_the_logits_processor_is_loaded_for_geometry_alone(tmp_path: Path) -> None:
    """vLLM drafts nothing beside it."""
    python = fake_python(tmp_path, "")
    for changes, is_loaded in (({}, False), ({"grammar": "any"}, False), ({"corners": "valid"}, True)):
        decode = decode_request(max_new_tokens=60, **({"grammar": "any"} if changes else {}) | changes).params
        argv = commands(python, decode, ngram_tokens=4)[0].argv
        assert ("--logits-processors" in argv) == ("--no-async-scheduling" in argv) == is_loaded
        assert ("--speculative-config" in argv) == (not is_loaded)


@pytest.mark.parametrize("said", ["", "two", "-1"])
def test_an_interpreter_that_does_not_report_its_gpus_is_an_error(tmp_path: Path, said: str) -> None:
    with pytest.raises(ServerError, match="does not report the GPUs"):
        commands(fake_python(tmp_path, "", gpus=said))


def test_server_arguments_set_by_coordexp_are_rejected() -> None:
    """However they are spelled: vLLM takes underscores, beginnings of names, and keys after a dot."""
    ours = [
        "--model=x",
        "--served_model_name",
        "--max-num",
        "--port",
        "--dtype=half",
        "-tp",
        "-tp=2",
        "--config",
        "--api-key=x",
    ]
    for argument in [*ours, "--speculative-config.method", "--logits_processors"]:
        with pytest.raises(ValidationError, match="is set by coordexp"):
            rollout_config(arguments=(argument,))
    assert rollout_config(arguments=["--max-num-batched-tokens", "4096", "-O3"]).serve.arguments[1] == "4096"


def test_a_further_server_on_a_machine_takes_the_next_port(tmp_path: Path) -> None:
    python, first = fake_python(tmp_path, SERVES), 20000 + os.getpid() % 20000
    with vllm_servers(commands(python, devices="cpu,cpu"), port=first, key="k") as servers:
        assert [server.url for server in servers] == [f"http://:k@127.0.0.1:{first + i}" for i in range(2)]


def test_what_serve_prints_is_what_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    """Of the base model, whose own files ask for other picture sizes than the profile."""
    python = fake_python(tmp_path, SERVES)
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    run = RunConfig.read(repository / "params.yaml", "smoke")
    rollout = run.profile.rollout.model_copy(update={"vllm_python": str(python)})
    run = replace(run, profile=run.profile.model_copy(update={"rollout": rollout}))
    base, port = repository / "models" / "tiny-base", 20000 + os.getpid() % 20000
    print_commands(run, base, "127.0.0.1", port)
    printed = shlex.split(capsys.readouterr().out)
    form = asked_format(run, base)
    made = server_commands(run.profile.rollout, Weights.of(base), form.pixels, run.params.decode)
    with vllm_servers(made, port=port, key="s3cret") as [server]:
        told = started(server, tmp_path)
    variables = dict(item.split("=", 1) for item in printed[: printed.index(str(python))])
    assert printed[printed.index(str(python)) + 1 :] == told["argv"]
    assert variables.items() <= told["environment"].items()
    assert f'"longest_edge": {run.profile.model.max_pixels}' in " ".join(told["argv"])


def test_a_killed_process_leaves_neither_server_nor_folder(tmp_path: Path) -> None:
    python = fake_python(tmp_path, SERVES)
    pid = os.fork()
    if pid == 0:
        with vllm_servers(commands(python)) as [server]:
            told = started(server, tmp_path)
            (tmp_path / "up.tmp").write_text(f"{told['pid']} {told['worker']} {server.process.pid}")
            (tmp_path / "up.tmp").rename(tmp_path / "up")
            time.sleep(600)
    ends_at = time.monotonic() + 30
    while not (tmp_path / "up").is_file():
        assert time.monotonic() < ends_at
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until_gone(*map(int, (tmp_path / "up").read_text().split()))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_server_that_ignores_sigterm_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "STOP_SECONDS", 0.2)
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVES
    with vllm_servers(commands(fake_python(tmp_path, deaf))) as [server]:
        told = started(server, tmp_path)
    wait_until_gone(told["pid"], told["worker"], server.process.pid)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('no CUDA device'); raise SystemExit(3)", r"exited with code 3, .*\n.*no CUDA device"),
        ("import os; print('gone', flush=True); os.kill(os.getpid(), 9)", r"exited with code 137, .*\ngone"),
        ("print('\\x1b[31mred'); raise SystemExit(3)", r"\\u001b\[31mred"),
    ],
)
def test_a_server_that_does_not_come_up_says_why(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(ServerError, match=f"(?s){words}"), vllm_servers(commands(fake_python(tmp_path, body))):
        pass
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_interpreter_that_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make vllm"):
        commands(tmp_path / "no")
    python = fake_python(tmp_path, "")
    python.chmod(0o644)
    with pytest.raises(ServerError, match="Permission denied"):
        commands(python)


class Stranger(BaseHTTPRequestHandler):
    """Says yes to whoever asks, or only to those with any key, and remembers what it was sent."""

    asks_for_a_key = False
    heard: list[str | None]

    def do_GET(self) -> None:
        self.heard.append(self.headers["Authorization"])
        self.send_response(401 if self.asks_for_a_key and not self.headers["Authorization"] else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.mark.parametrize(
    ("asks_for_a_key", "is_other_user", "body", "words"),
    [
        (False, False, "import time; time.sleep(60)", "is not up.*another"),
        (True, True, "import time; time.sleep(60)", "is not up.*another"),
        (True, True, SERVES, "exited with code 1.*Address already in use"),
    ],
)
def test_another_listener_on_the_port_is_not_taken_for_the_server_and_is_told_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks_for_a_key: bool, is_other_user: bool, body: str, words: str
) -> None:
    monkeypatch.setattr(subject, "STARTUP_SECONDS", 60.0 if body == SERVES else 0.3)
    if is_other_user:
        monkeypatch.setattr("os.getuid", lambda: 12345)
    handler = type("Handler", (Stranger,), {"asks_for_a_key": asks_for_a_key, "heard": []})
    started = subject._started

    def after_a_stranger(command: ServerCommand, host: str, port: int, key: str) -> Any:
        """It may take the port that is held, as our own server may, and is faster."""
        strangers.append(ThreadingHTTPServer((host, port), handler))
        threading.Thread(target=strangers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return started(command, host, port, key)

    strangers: list[ThreadingHTTPServer] = []
    monkeypatch.setattr(subject, "_started", after_a_stranger)
    try:
        with pytest.raises(ServerError, match=f"(?s){words}"), vllm_servers(commands(fake_python(tmp_path, body))):
            pass
    finally:
        for stranger in strangers:
            stranger.shutdown()
            stranger.server_close()
    assert set(handler.heard) <= {None}  # type: ignore[attr-defined]


def test_a_port_is_reserved_before_the_server_starts(tmp_path: Path) -> None:
    """Nobody is given it meanwhile, and one that somebody has is refused at once."""
    with vllm_servers(commands(fake_python(tmp_path, SERVES))) as [server]:
        port = urllib.parse.urlsplit(server.url).port or 0
        os.killpg(server.process.pid, signal.SIGKILL)
        wait_until_gone(server.process.pid)
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused = pytest.raises(ServerError, match=f"cannot use 127.0.0.1:{port}: Address already in use")
        with refused, vllm_servers(commands(fake_python(tmp_path, "")), port=port):
            pass


@pytest.mark.parametrize("given", ["", "s3cret"])
def test_serve_prints_urls_that_may_be_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    """The key is not in them; one that the environment gave is not printed at all."""
    if given:
        monkeypatch.setenv(KEY_VARIABLE, given)
    python = fake_python(tmp_path, SERVES)
    monkeypatch.setattr("coordexp.rollout.serve._commands", lambda *_: commands(python))
    monkeypatch.setattr("coordexp.rollout.serve.LOOK_SECONDS", -1)  # of which sleep() refuses
    with pytest.raises(ValueError, match="non-negative"):
        run_servers(None, tmp_path, "127.0.0.1", port := 20000 + os.getpid() % 20000)  # type: ignore[arg-type]
    *key, engine, servers, listed, url = capsys.readouterr().out.splitlines()
    assert [engine, servers, listed, url] == [
        "rollout:",
        "  engine: vllm",
        "  servers:",
        f"    - http://127.0.0.1:{port}",
    ]
    assert len(key) == (0 if given else 1)
    assert all(line.startswith(f"export {KEY_VARIABLE}=") for line in key)


def test_a_profile_holds_no_key_and_the_environment_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://:s3cret@gpu-3:8000", "http://me:s3cret@gpu-3:8000"):
        with pytest.raises(ValidationError, match="VLLM_API_KEY") as caught:
            RolloutConfig.model_validate(rollout_config().model_dump() | {"servers": [url]})
        assert all("s3cret" not in str(fault["ctx"]) for fault in caught.value.errors())
    with vllm_servers(commands(fake_python(tmp_path, SERVES)), key="s3cret") as [server]:
        shown = server.url.replace(":s3cret@", "")
        with pytest.raises(ServerError, match="HTTP 401"):
            pool(shown).ask(0, {}, bytes)
        monkeypatch.setenv(KEY_VARIABLE, "s3cret")
        assert pool(shown).ask(0, {}, bytes) == b""
