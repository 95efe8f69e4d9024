"""A vLLM server of our own: started on a checkpoint in the environment that `make vllm` builds, and stopped with us."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import coordexp
from coordexp.errors import ConfigError, TrainingError
from coordexp.models.processor import PROCESSOR_FILES, write_processor_files
from coordexp.packing.pixels import PixelSpec
from coordexp.rollout.vllm_client import SERVED_NAME, is_healthy

log = logging.getLogger(__name__)

STARTUP_SECONDS = 900.0
STOP_SECONDS = 20.0
PROMPT_ROOM = 256  # tokens of a prompt beside its image
_SOURCE = Path(coordexp.__file__).parents[1]
_SITE = Path(__file__).with_name("vllm_site")


@dataclass(frozen=True, slots=True)
class VllmServer:
    """A running server; `pid` leads its process group."""

    url: str
    pid: int


@contextmanager
def vllm_server(python: Path, checkpoint: Path, pixels: PixelSpec, max_new_tokens: int) -> Iterator[VllmServer]:
    """Serve a checkpoint until the block ends.

    Raises:
        ConfigError: there is no such interpreter.
        TrainingError: the server does not come up; the end of its log is in the message.
    """
    if not python.is_file():
        raise ConfigError(
            f"rollout.vllm_python is {str(python)!r}: no such file. Run `make vllm`, or set rollout.servers to URLs."
        )
    with TemporaryDirectory(prefix="coordexp-vllm-") as name:
        folder = Path(name) / "checkpoint"
        link_checkpoint(checkpoint, folder, pixels)
        port, output = _free_port(), Path(name) / "server.log"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [str(python), *_arguments(folder, port, pixels, max_new_tokens)],
                env=os.environ | _environment(),
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = VllmServer(f"http://127.0.0.1:{port}", process.pid)
        try:
            _wait_until_up(server, process, output)
            yield server
        finally:
            _stop(process)


def _arguments(folder: Path, port: int, pixels: PixelSpec, max_new_tokens: int) -> list[str]:
    image_tokens = pixels.max_pixels // pixels.factor**2
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", SERVED_NAME]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--max-model-len", str(image_tokens + PROMPT_ROOM + max_new_tokens)]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0})]
    arguments += ["--logits-processors", "coordexp.rollout.vllm_processor:AnswerProcessor"]
    # The processor must have seen every token before it judges the next, which overlapped scheduling does not grant.
    arguments += ["--no-async-scheduling"]
    if not torch.cuda.is_available():
        arguments += ["--dtype", "float32", "--enforce-eager"]
    return arguments


def _environment() -> dict[str, str]:
    paths = [str(_SITE), str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
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


def _wait_until_up(server: VllmServer, process: subprocess.Popen[bytes], output: Path) -> None:
    started = time.monotonic()
    while not is_healthy(server.url):
        waited = time.monotonic() - started
        if process.poll() is not None or waited > STARTUP_SECONDS:
            state = "is not up" if process.poll() is None else f"exited with code {process.returncode}"
            tail = "\n".join(output.read_text(errors="replace").splitlines()[-15:])
            raise TrainingError(f"the vLLM server {state} after {waited:.0f} s. The end of its log:\n{tail}")
        time.sleep(1.0)
    log.info("vLLM server %s is up after %.0f s", server.url, time.monotonic() - started)


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
