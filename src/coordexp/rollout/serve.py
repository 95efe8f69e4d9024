"""`coordexp serve`: print the commands of the servers that a stage would start, or run them until Ctrl-C."""

from __future__ import annotations

import os
import platform
import secrets
import time
from pathlib import Path

from coordexp.config.run import RunConfig
from coordexp.errors import ServerError
from coordexp.rollout.stages import asked_format
from coordexp.rollout.vllm_command import ServerCommand, Weights, server_commands
from coordexp.rollout.vllm_http import KEY_VARIABLE
from coordexp.rollout.vllm_server import vllm_servers

LOOK_SECONDS = 2.0


def print_commands(run: RunConfig, folder: Path, host: str, port: int) -> None:
    """Print one shell line per server, for a machine with the same paths; the key is the environment's or a new one."""
    key = os.environ.get(KEY_VARIABLE) or secrets.token_urlsafe(24)
    for place, command in enumerate(_commands(run, folder), port):
        print(command.shell(host, place, key))


def run_servers(run: RunConfig, folder: Path, host: str, port: int) -> None:
    """Start the servers; when all are up, print the lines for the profile and the shell of a stage; then wait.

    Profiles are in git, so their URLs do not contain the key. A key from the environment is not printed.

    Raises:
        ServerError: a server does not start, or ends.
    """
    commands, given = _commands(run, folder), os.environ.get(KEY_VARIABLE, "")
    key = given or secrets.token_urlsafe(24)
    with vllm_servers(commands, host=host, port=port, key=key) as servers:
        shown = platform.node() if host in ("0.0.0.0", "::") else host
        if not given:
            print(f"export {KEY_VARIABLE}={key}")
        print("rollout:\n  engine: vllm\n  servers:")
        for place in range(port, port + len(servers)):
            print(f"    - http://{shown}:{place}", flush=True)
        try:
            while all(server.process.poll() is None for server in servers):
                time.sleep(LOOK_SECONDS)
        except KeyboardInterrupt:
            return
    raise ServerError(f"a server of {folder} ended unexpectedly; the others were stopped. Start them again.")


def _commands(run: RunConfig, folder: Path) -> list[ServerCommand]:
    form = asked_format(run, folder)
    return server_commands(run.profile.rollout, Weights.of(folder), form.pixels, run.params.decode)
