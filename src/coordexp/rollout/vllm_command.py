"""The command of a vLLM server: what a stage starts, and what `coordexp serve` prints or starts.

What the server's own interpreter sees decides: its torch may be another build than ours, with or without CUDA.
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

PROMPT_ROOM = 256  # tokens of a prompt beside its image
# Tokens that must repeat before what followed them is drafted. One: what follows a coordinate never stood there before.
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
    """The weights of a checkpoint folder; servers that hold them call their model `name`, which carries the hash."""

    folder: Path
    name: str

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """Reads all of them."""
        return cls(folder, f"coordexp-{fingerprint({}, weight_files(folder))}")


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How one server is started: arguments and what is added to the environment. Place and API key come at a start."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    def at(self, host: str, port: int) -> tuple[str, ...]:
        """The arguments with the place to listen at."""
        return (*self.argv, "--host", host, "--port", str(port))

    def shell(self, host: str, port: int, key: str) -> str:
        """One line for a shell. The key is no argument: every user of the machine can read those."""
        variables = {**self.environment, KEY_VARIABLE: key}
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in variables.items()), shlex.join(self.at(host, port))])


def server_commands(
    rollout: RolloutConfig, weights: Weights, pixels: PixelSpec, decode: DecodeParams
) -> list[ServerCommand]:
    """The servers of a checkpoint, one for each device or tensor-parallel group of devices.

    Args:
        rollout: the interpreter with vLLM, and how its servers are placed.
        weights: what is served.
        pixels: the image format; a base model is asked about other sizes than its own files say.
        decode: what requests may ask for.

    Raises:
        ConfigError: there is no such interpreter, or the devices that are asked for are not there.
        ServerError: the interpreter does not run, or does not import torch.
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
    """The devices of each server, from those that its interpreter sees; raises ConfigError if they do not suffice."""
    wanted = list(visible or (CPU,)) if serve.devices == "auto" else serve.devices.split(",")
    missing = [name for name in wanted if name != CPU and name not in visible]
    if missing:
        raise ConfigError(
            f"rollout.serve.devices names {', '.join(missing)}, but the interpreter of the servers sees "
            f"{', '.join(visible) or 'no GPU'}. Name those it sees, or auto; a CPU build sees none: `make vllm`."
        )
    size = serve.tensor_parallel
    if len(wanted) % size:
        raise ConfigError(
            f"rollout.serve: {len(wanted)} devices ({', '.join(wanted)}) are no whole number of groups of "
            f"tensor_parallel {size}. Change one of them."
        )
    return [tuple(wanted[first : first + size]) for first in range(0, len(wanted), size)]


def _visible_devices(python: Path) -> list[str]:
    """The GPUs that the torch of this interpreter sees, named as in CUDA_VISIBLE_DEVICES."""
    seen = _probe(python)
    if seen == 0 and _DRIVER.exists():
        log.warning(
            "this machine has an NVIDIA driver, but the torch of %s sees no GPU: servers run on the CPU. `make vllm` "
            "installs the CUDA build.",
            python,
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return ([name.strip() for name in names.split(",")] if names else [str(i) for i in range(seen)])[:seen]


def _probe(python: Path) -> int:
    """How many GPUs the torch of an interpreter sees."""
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
            f"{python}: its torch cannot be asked for GPUs (exit code {done.returncode}): {excerpt(said)}. Expected "
            "the environment of `make vllm`."
        )
    return int(last)


def _arguments(serve: ServeConfig, weights: Weights, pixels: PixelSpec, decode: DecodeParams) -> list[str]:
    image_tokens = pixels.max_pixels // pixels.factor**2
    size = {"shortest_edge": pixels.min_pixels, "longest_edge": pixels.max_pixels}  # areas, despite the names
    arguments = ["--model", str(weights.folder.resolve()), "--served-model-name", weights.name]
    arguments += ["--max-model-len", str(image_tokens + PROMPT_ROOM + decode.max_new_tokens)]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0})]
    arguments += ["--mm-processor-kwargs", json.dumps({"size": size})]
    arguments += ["--generation-config", "vllm"]  # what a folder prefers would change answers: each request says it all
    if serve.max_num_seqs:
        arguments += ["--max-num-seqs", str(serve.max_num_seqs)]
    if decode.needs_walk:
        arguments += ["--logits-processors", "coordexp.rollout.vllm_processor:AnswerProcessor"]
        # The processor must have seen every token before it judges the next; overlapped scheduling does not grant it.
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
        **({"VLLM_CPU_KVCACHE_SPACE": "1"} if is_cpu else {}),
    }
