"""The block `rollout.serve`: how vLLM servers are started, and which of their options are not the user's to set."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from coordexp.config.block import Block, Count, PositiveCount, Text, Texts

# Options of vLLM's server that may not stand among the further arguments, and what decides them.
OWN_OPTIONS = {
    "--model": "the checkpoint",
    "--served-model-name": "it carries the hash of the weights",
    "--host": "coordexp serve --host",
    "--port": "coordexp serve --port",
    "--uds": "servers are asked over TCP",
    "--api-key": "VLLM_API_KEY; every user of the machine can read arguments",
    "--config": "a file of arguments could hold any of these",
    "--root-path": "paths are vLLM's own",
    "--ssl-keyfile": "servers are asked over http; put a proxy of yours in front",
    "--ssl-certfile": "servers are asked over http; put a proxy of yours in front",
    "--max-model-len": "the picture and decode.max_new_tokens",
    "--limit-mm-per-prompt": "one picture a question",
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
    """The vLLM servers that a stage starts, and `coordexp serve`: one for each device or group of devices."""

    devices: Text = Field(
        description="auto: all GPUs, or the CPU; or names with commas: 0,1,2,3; cpu,cpu is two on the CPU"
    )
    tensor_parallel: PositiveCount = Field(description="devices that one server is spread over")
    gpu_memory_utilization: float = Field(gt=0, le=1, description="fraction of each GPU's memory that a server takes")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        description="of weights and compute; auto is bfloat16 on GPUs and float32 on the CPU"
    )
    max_num_seqs: Count = Field(description="most answers that one server works on at a time; 0 is vLLM's choice")
    ngram_tokens: int = Field(
        ge=0,
        le=64,
        description="tokens drafted from repeats in the text; 0: none; not beside corners and duplicate_iou",
    )
    arguments: Texts = Field(description="further arguments of vLLM's server, such as [--enforce-eager]")

    @field_validator("devices")
    @classmethod
    def _devices_are_names(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if "" in names or (len(names) > 1 and "auto" in names) or ("cpu" in names and set(names) != {"cpu"}):
            raise ValueError(f"found {value!r}, expected auto, or names of GPUs, or cpu, with commas between them.")
        if len(set(names)) < len(names) and "cpu" not in names:
            raise ValueError(f"found {value!r}, which names a GPU twice; name each once.")
        return ",".join(names)

    @field_validator("arguments")
    @classmethod
    def _arguments_leave_ours_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            if option := _set_by_us(argument):
                raise ValueError(f"found {argument!r}, but {option} is set by coordexp ({OWN_OPTIONS[option]}).")
        return value


def _set_by_us(argument: str) -> str | None:
    """The option of `OWN_OPTIONS` that an argument states; as vLLM reads it, cut short and in both spellings."""
    name = re.split(r"[=.]", argument, maxsplit=1)[0].replace("_", "-")
    if name in OWN_OPTIONS:
        return name
    is_long = name.startswith("--") and len(name) > 2
    return next((own for own in OWN_OPTIONS if is_long and own.startswith(name)), None)
