"""The command of a vLLM server, which a stage starts and `coordexp serve` prints or starts.

The devices are those that the server's own interpreter detects: its torch may be another build than ours, with or
without CUDA.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import coordexp
from coordexp.config.profile import RolloutConfig
from coordexp.config.schema import DecodeParams
from coordexp.config.serving import ServeConfig
from coordexp.errors import ConfigError, ServerError
from coordexp.infra.printable import excerpt
from coordexp.infra.provenance import fingerprint, weight_files
from coordexp.packing.pixels import PixelSpec
from coordexp.rollout.vllm_http import KEY_VARIABLE

PROMPT_ROOM = 256  # tokens of a prompt in addition to its image
# Tokens that must match before their continuation is drafted. The minimum is 1, because a longer match that includes a
# coordinate has hardly ever occurred before.
NGRAM_LONGEST, NGRAM_SHORTEST = 4, 1
CPU = "cpu"
_PROBE = "import torch; print(torch.cuda.device_count())"
_PROBE_SECONDS = 120.0
_DRIVER = Path("/proc/driver/nvidia/version")
_SOURCE = Path(coordexp.__file__).parents[1]
_SITE = Path(__file__).with_name("vllm_site")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a checkpoint folder; `name`, the model name of their servers, contains their hash."""

    folder: Path
    name: str

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """The weights of a folder; reads all of them for the hash."""
        return cls(folder, f"coordexp-{fingerprint({}, weight_files(folder))}")


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start one server: arguments and additional environment. Address and API key are added at the start."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    def at(self, host: str, port: int) -> tuple[str, ...]:
        """The arguments with the address to listen on."""
        return (*self.argv, "--host", host, "--port", str(port))

    def shell(self, host: str, port: int, key: str) -> str:
        """One line for a shell. The key is not an argument, because every user of the machine can read arguments."""
        variables = {**self.environment, KEY_VARIABLE: key}
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in variables.items()), shlex.join(self.at(host, port))])


def server_commands(
    rollout: RolloutConfig, weights: Weights, pixels: PixelSpec, decode: DecodeParams
) -> list[ServerCommand]:
    """The servers of a checkpoint, one for each device or tensor-parallel group of devices.

    Args:
        rollout: the interpreter with vLLM, and the placement of its servers.
        weights: the weights to serve.
        pixels: the image format; a base model gets other image sizes than its own files specify.
        decode: the options that requests will use.

    Raises:
        ConfigError: the interpreter or a requested device does not exist.
        ServerError: the interpreter does not run, or cannot import torch.
    """
    python, serve = Path(rollout.vllm_python), rollout.serve
    if not python.is_file():
        raise ConfigError(
            f"rollout.vllm_python is {str(python)!r}: no such file. Run `make vllm`, or set rollout.servers to URLs."
        )
    groups = device_groups(serve, _visible_devices(python))
    start = (str(python.absolute()), "-m", "vllm.entrypoints.openai.api_server")
    shared = _arguments(serve, weights, pixels, decode)
    return [ServerCommand((*start, *shared, *_device_arguments(serve, group)), _environment(group)) for group in groups]


def device_groups(serve: ServeConfig, visible: Sequence[str]) -> list[tuple[str, ...]]:
    """The devices of each server, from those that its interpreter detects; raises ConfigError if one is missing."""
    wanted = list(visible or (CPU,)) if serve.devices == "auto" else serve.devices.split(",")
    missing = [name for name in wanted if name != CPU and name not in visible]
    if missing:
        raise ConfigError(
            f"rollout.serve.devices names {', '.join(missing)}, but the interpreter of the servers detects "
            f"{', '.join(visible) or 'no GPU'}. Name detected devices, or set auto. A CPU build of torch detects no "
            "GPU; `make vllm` installs the CUDA build."
        )
    size = serve.tensor_parallel
    if len(wanted) % size:
        raise ConfigError(
            f"rollout.serve: {len(wanted)} devices ({', '.join(wanted)}) cannot be divided into groups of "
            f"tensor_parallel {size}. Change one of the two."
        )
    return [tuple(wanted[first : first + size]) for first in range(0, len(wanted), size)]


def _visible_devices(python: Path) -> list[str]:
    """The GPUs that the interpreter's torch detects, named as in CUDA_VISIBLE_DEVICES."""
    seen = _probe(python)
    if seen == 0 and _DRIVER.exists():
        log.warning(
            "this machine has an NVIDIA driver, but the torch of %s detects no GPU, so the servers run on the CPU. "
            "`make vllm` installs the CUDA build.",
            python,
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return ([name.strip() for name in names.split(",")] if names else [str(i) for i in range(seen)])[:seen]


def _probe(python: Path) -> int:
    """The number of GPUs that an interpreter's torch detects."""
    try:
        done = subprocess.run([str(python), "-c", _PROBE], capture_output=True, timeout=_PROBE_SECONDS, check=False)
    except OSError as error:
        raise ServerError(f"rollout.vllm_python {str(python)!r} cannot be run: {error.strerror}.") from error
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"{python}: `import torch` took more than {_PROBE_SECONDS:.0f} s.") from error
    last = done.stdout.strip().rpartition(b"\n")[2]
    if done.returncode or not last.isdigit():
        said = (done.stderr or done.stdout).strip().rpartition(b"\n")[2]
        raise ServerError(
            f"{python}: its torch does not report the GPUs (exit code {done.returncode}): {excerpt(said)}. Expected "
            "the environment that `make vllm` builds."
        )
    return int(last)


def _arguments(serve: ServeConfig, weights: Weights, pixels: PixelSpec, decode: DecodeParams) -> list[str]:
    image_tokens = pixels.max_pixels // pixels.factor**2
    size = {"shortest_edge": pixels.min_pixels, "longest_edge": pixels.max_pixels}  # areas in pixels, despite the names
    arguments = ["--model", str(weights.folder.resolve()), "--served-model-name", weights.name]
    arguments += ["--max-model-len", str(image_tokens + PROMPT_ROOM + decode.max_new_tokens)]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0})]
    arguments += ["--mm-processor-kwargs", json.dumps({"size": size})]
    arguments += ["--generation-config", "vllm"]  # ignore the folder's sampling defaults: each request sets all options
    if serve.max_num_seqs:
        arguments += ["--max-num-seqs", str(serve.max_num_seqs)]
    if decode.needs_walk:
        arguments += ["--logits-processors", "coordexp.rollout.vllm_processor:AnswerProcessor"]
        # The processor must receive every token before it masks the next one; asynchronous scheduling breaks that.
        arguments += ["--no-async-scheduling"]
    elif serve.ngram_tokens:
        drafts = {"method": "ngram", "num_speculative_tokens": serve.ngram_tokens}
        drafts |= {"prompt_lookup_max": NGRAM_LONGEST, "prompt_lookup_min": NGRAM_SHORTEST}
        arguments += ["--speculative-config", json.dumps(drafts)]
    return [*arguments, *serve.arguments]


def _device_arguments(serve: ServeConfig, group: Sequence[str]) -> list[str]:
    is_cpu = CPU in group
    dtype = serve.dtype if serve.dtype != "auto" else "float32" if is_cpu else "bfloat16"
    arguments = ["--dtype", dtype, "--tensor-parallel-size", str(len(group))]
    if is_cpu:
        return [*arguments, "--enforce-eager"]
    return [*arguments, "--gpu-memory-utilization", str(serve.gpu_memory_utilization)]


def _environment(group: Sequence[str]) -> dict[str, str]:
    paths = [str(_SITE), str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    is_cpu = CPU in group
    return {
        "CUDA_VISIBLE_DEVICES": "" if is_cpu else ",".join(group),
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # On CPU, the process of the engine also computes; vLLM's default is one more, which it polls for each token.
        **({"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if is_cpu else {}),
    }
