"""vLLM servers that this process starts, in the environment that `make vllm` builds, and stops when it ends.

Every start has its own API key, which only these servers know. Another program on the same port is therefore not
mistaken for a server, and other users of the machine cannot send requests.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from coordexp.errors import ServerError
from coordexp.infra.printable import excerpt
from coordexp.rollout.vllm_client import HEALTH_SECONDS
from coordexp.rollout.vllm_command import ServerCommand
from coordexp.rollout.vllm_http import KEY_VARIABLE, Address, ServerFault, exchange, parse_address

log = logging.getLogger(__name__)

LOCAL = "127.0.0.1"
STARTUP_SECONDS = 900.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.5
# Variables that torchrun sets for its processes. A server must not see them: torch.distributed in vLLM would use them.
LAUNCHED = frozenset({"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
LAUNCHED_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_GUARD = Path(__file__).with_name("vllm_guard.py")
_LISTENERS, _LISTENING = (Path("/proc/net/tcp"), Path("/proc/net/tcp6")), "0A"


@dataclass(frozen=True, slots=True)
class VllmServer:
    """A running server; `url` contains its key, as ServerPool expects, and `process` leads its process group."""

    url: str = field(repr=False)
    process: subprocess.Popen[bytes]
    log_file: Path


@contextmanager
def vllm_servers(
    commands: Sequence[ServerCommand], *, host: str = LOCAL, port: int | None = None, key: str = ""
) -> Iterator[list[VllmServer]]:
    """Run servers until the block, or this process, ends in any way; all are up when the block begins.

    Args:
        commands: from `vllm_command.server_commands`; all start at once.
        host: address to listen on.
        port: port of the first server; the others use the next ones. None means any free ports.
        key: API key that requests need; by default each server gets a new one.

    Raises:
        ServerError: a port is in use, or a server does not start; the message contains the end of its log.
    """
    wanted = [0] * len(commands) if port is None else range(port, port + len(commands))
    with ExitStack() as stack:
        ports = [stack.enter_context(_held_port(host, place)) for place in wanted]
        servers = [
            stack.enter_context(_started(command, host, place, key or secrets.token_urlsafe(24)))
            for command, place in zip(commands, ports, strict=True)
        ]
        for server in servers:
            _wait_until_up(server)
        yield servers


@contextmanager
def _started(command: ServerCommand, host: str, port: int, key: str) -> Iterator[VllmServer]:
    with TemporaryDirectory(prefix="coordexp-vllm-") as folder:
        output = Path(folder) / "server.log"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(os.getpid()), folder, *command.at(host, port)],
                # The key is not an argument, because every user of the machine can read arguments.
                env={**_inherited(), **command.environment, KEY_VARIABLE: key},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield VllmServer(f"http://:{key}@{_reachable(host)}:{port}", process, output)
        finally:
            _stop(process)


def _inherited() -> dict[str, str]:
    """Our environment without the variables of a training launcher: a server is not part of the training run."""
    return {k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith(LAUNCHED_PREFIXES)}


def _reachable(host: str) -> str:
    """The local address of a server that listens on `host`."""
    return LOCAL if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host


@contextmanager
def _held_port(host: str, port: int) -> Iterator[int]:
    """Reserve a port for one server (0 means any free port) until the block ends.

    This process binds the port without listening on it. A server with SO_REUSEADDR can listen there meanwhile.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"a vLLM server cannot use {host}:{port}: {error.strerror or error}. Stop the program that listens "
                "there, or choose another address or port."
            ) from error
        yield holder.getsockname()[1]


def _wait_until_up(server: VllmServer) -> None:
    address, started = parse_address(server.url), time.monotonic()
    while True:
        # Check the process first: if it has ended, another program answers on its port.
        code, waited = server.process.poll(), time.monotonic() - started
        if code is None and _is_ours(address):
            log.info("vLLM server %s is up after %.0f s", address.url, waited)
            return
        if code is not None or waited > STARTUP_SECONDS:
            state = f"exited with code {code}" if code is not None else "is not up, or another process uses its port"
            tail = "\n".join(map(excerpt, server.log_file.read_text(errors="replace").splitlines()[-15:]))
            raise ServerError(f"the vLLM server {state}, after {waited:.0f} s. The end of its log:\n{tail}")
        time.sleep(POLL_SECONDS)


def _is_ours(address: Address) -> bool:
    """Whether the program on that port requires a key and accepts ours. (vLLM's health check requires none.)

    The key is never sent to another user's process.
    """
    if _others_listen(address.port):
        return False
    asked = ((address.without_key(), 401), (address, 200))
    try:
        return all(exchange(a, "/v1/models", None, HEALTH_SECONDS).status == status for a, status in asked)
    except ServerFault:
        return False


def _others_listen(port: int) -> bool:
    """Whether a process of another user listens on this port; False on a system without /proc/net/tcp."""
    for table in _LISTENERS:
        for line in table.read_text(encoding="ascii").splitlines()[1:] if table.is_file() else ():
            _, local, _, state, _, _, _, uid, *_ = line.split()
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port and int(uid) != os.getuid():
                return True
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which share its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
