"""The block `rollout.serve`: how vLLM servers are started, and which of their options coordexp itself sets."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from coordexp.config.block import Block, Count, PositiveCount, Text, Texts

# Options of vLLM's server that `arguments` must not contain, and what sets them instead.
OWN_OPTIONS = {
    "--model": "the checkpoint",
    "--served-model-name": "the name contains the hash of the weights",
    "--host": "coordexp serve --host",
    "--port": "coordexp serve --port",
    "--uds": "servers are reached over TCP",
    "--api-key": "VLLM_API_KEY; every user of the machine can read command-line arguments",
    "--config": "a file of arguments could contain any of these options",
    "--root-path": "paths are vLLM's own",
    "--ssl-keyfile": "servers are reached over http; put your own proxy in front",
    "--ssl-certfile": "servers are reached over http; put your own proxy in front",
    "--max-model-len": "the image size and decode.max_new_tokens",
    "--limit-mm-per-prompt": "one image per prompt",
    "--mm-processor-kwargs": "the pixel limits of the checkpoint",
    "--generation-config": "params.yaml: decode",
    "--logits-processors": "decode.corners and decode.duplicate_iou",
    "--async-scheduling": "decode.corners and decode.duplicate_iou",
    "--no-async-scheduling": "decode.corners and decode.duplicate_iou",
    "--speculative-config": "rollout.serve.ngram_tokens",
    "--dtype": "rollout.serve.dtype",
    "--tensor-parallel-size": "rollout.serve.tensor_parallel",
    "-tp": "rollout.serve.tensor_parallel",
    "--data-parallel-size": "rollout.serve.devices: each server is one",
    "-dp": "rollout.serve.devices: each server is one",
    "--gpu-memory-utilization": "rollout.serve.gpu_memory_utilization",
    "--max-num-seqs": "rollout.serve.max_num_seqs",
}


class ServeConfig(Block):
    """The vLLM servers that a stage or `coordexp serve` starts: one per device or group of devices."""

    devices: Text = Field(
        description="auto (all GPUs, or the CPU), or a list: 0,1,2,3; cpu,cpu is two servers on the CPU"
    )
    tensor_parallel: PositiveCount = Field(description="devices per server")
    gpu_memory_utilization: float = Field(gt=0, le=1, description="fraction of each GPU's memory that a server uses")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        description="dtype of weights and compute; auto is bfloat16 on GPUs and float32 on the CPU"
    )
    max_num_seqs: Count = Field(description="maximum number of concurrent answers per server; 0 is vLLM's choice")
    ngram_tokens: int = Field(
        ge=0,
        le=64,
        description="tokens drafted from repeats; 0 is off; incompatible with corners, duplicate_iou",
    )
    arguments: Texts = Field(description="additional arguments of vLLM's server, such as [--enforce-eager]")

    @field_validator("devices")
    @classmethod
    def _devices_are_names(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if "" in names or (len(names) > 1 and "auto" in names) or ("cpu" in names and set(names) != {"cpu"}):
            raise ValueError(f"found {value!r}, expected auto, or GPU names or cpu, separated by commas.")
        if len(set(names)) < len(names) and "cpu" not in names:
            raise ValueError(f"found {value!r}, which lists a GPU twice; list each once.")
        return ",".join(names)

    @field_validator("arguments")
    @classmethod
    def _arguments_leave_ours_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            if option := _set_by_us(argument):
                raise ValueError(f"found {argument!r}, but {option} is set by coordexp ({OWN_OPTIONS[option]}).")
        return value


def _set_by_us(argument: str) -> str | None:
    """The option of `OWN_OPTIONS` that an argument sets; like vLLM, it accepts abbreviations and both spellings."""
    name = re.split(r"[=.]", argument, maxsplit=1)[0].replace("_", "-")
    if name in OWN_OPTIONS:
        return name
    is_long = name.startswith("--") and len(name) > 2
    return next((own for own in OWN_OPTIONS if is_long and own.startswith(name)), None)
