"""A vLLM server of our own: started on a checkpoint in the environment that `make vllm` builds, and stopped with us.

Every start has its own API key. Only the server that we started knows it, so nothing else that listens on its port is
taken for it, and nobody else on this machine can ask it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import coordexp
from coordexp.errors import ConfigError, ServerError
from coordexp.models.processor import PROCESSOR_FILES, write_processor_files
from coordexp.packing.pixels import PixelSpec
from coordexp.rollout.vllm_client import HEALTH_SECONDS, SERVED_NAME
from coordexp.rollout.vllm_http import Address, ServerFault, excerpt, exchange, parse_address

log = logging.getLogger(__name__)

STARTUP_SECONDS = 900.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.5
PROMPT_ROOM = 256  # tokens of a prompt beside its image
_SOURCE = Path(coordexp.__file__).parents[1]
_SITE = Path(__file__).with_name("vllm_site")
_GUARD = Path(__file__).with_name("vllm_guard.py")


@dataclass(frozen=True, slots=True)
class VllmServer:
    """A running server; `url` holds its key, as ServerPool takes it, and `pid` leads its process group."""

    url: str = field(repr=False)
    pid: int


@contextmanager
def vllm_server(
    python: Path, checkpoint: Path, pixels: PixelSpec, max_new_tokens: int, *, constrained: bool = True
) -> Iterator[VllmServer]:
    """Serve a checkpoint until the block ends, or this process does, however it ends.

    Args:
        python: the interpreter of the environment that holds vLLM.
        checkpoint: a Hugging Face folder.
        pixels: the image format, for a checkpoint without processor files of its own.
        max_new_tokens: longest answer that will be asked for.
        constrained: whether requests may carry constraints; a server for none can draft tokens and overlap its steps.

    Raises:
        ConfigError: there is no such interpreter.
        ServerError: the server does not come up; the end of its log is in the message.
    """
    if not python.is_file():
        raise ConfigError(
            f"rollout.vllm_python is {str(python)!r}: no such file. Run `make vllm`, or set rollout.servers to URLs."
        )
    with TemporaryDirectory(prefix="coordexp-vllm-") as name:
        folder = Path(name) / "checkpoint"
        link_checkpoint(checkpoint, folder, pixels)
        port, key, output = _free_port(), secrets.token_urlsafe(24), Path(name) / "server.log"
        arguments = _arguments(folder, port, pixels, max_new_tokens, constrained)
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(os.getpid()), name, str(python), *arguments],
                env=os.environ | _environment(key),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = VllmServer(f"http://:{key}@127.0.0.1:{port}", process.pid)
        try:
            _wait_until_up(parse_address(server.url), process, output)
            yield server
        finally:
            _stop(process)


def _arguments(folder: Path, port: int, pixels: PixelSpec, max_new_tokens: int, constrained: bool) -> list[str]:
    image_tokens = pixels.max_pixels // pixels.factor**2
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", SERVED_NAME]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--max-model-len", str(image_tokens + PROMPT_ROOM + max_new_tokens)]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0})]
    if constrained:
        arguments += ["--logits-processors", "coordexp.rollout.vllm_processor:AnswerProcessor"]
        # The processor must have seen every token before it judges the next; overlapped scheduling does not grant it.
        arguments += ["--no-async-scheduling"]
    if not torch.cuda.is_available():
        arguments += ["--dtype", "float32", "--enforce-eager"]
    return arguments


def _environment(key: str) -> dict[str, str]:
    paths = [str(_SITE), str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "VLLM_API_KEY": key,  # not an argument: every user of the machine can read those
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def link_checkpoint(checkpoint: Path, folder: Path, pixels: PixelSpec) -> None:
    """A folder of links to a checkpoint that prepares pictures in this format: those asked about have it already."""
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name not in PROCESSOR_FILES:
            (folder / file.name).symlink_to(file.resolve())
    write_processor_files(folder, pixels)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_up(address: Address, process: subprocess.Popen[bytes], output: Path) -> None:
    started = time.monotonic()
    while True:
        # The process first: when it is gone, whatever answers on its port is somebody else.
        code, waited = process.poll(), time.monotonic() - started
        if code is None and _is_ours(address):
            log.info("vLLM server %s is up after %.0f s", address.url, waited)
            return
        if code is not None or waited > STARTUP_SECONDS:
            state = f"exited with code {code}" if code is not None else "is not up, or another process has its port"
            tail = "\n".join(map(excerpt, output.read_text(errors="replace").splitlines()[-15:]))
            raise ServerError(f"the vLLM server {state}, after {waited:.0f} s. The end of its log:\n{tail}")
        time.sleep(POLL_SECONDS)


def _is_ours(address: Address) -> bool:
    """Whether what listens there asks for a key and takes ours; vLLM's health check asks nobody for one."""
    asked = (address, address.without_key())
    try:
        return [exchange(a, "/v1/models", None, HEALTH_SECONDS).status for a in asked] == [200, 401]
    except ServerFault:
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
