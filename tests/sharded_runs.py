"""Started by torchrun in a test: runs the training stages of a list one after another in the same processes.

    torchrun --nproc-per-node 2 tests/sharded_runs.py runs.json

Each entry has a workspace, a stage, parameters, keys of the profile, and the number of nodes to simulate; `stop_in` is
a step in which process 1 receives SIGTERM. The run writes `held.json` with the fraction of weights and moments that
each process held.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.run import RunConfig
from coordexp.config.schema import Params
from coordexp.errors import Interrupted
from coordexp.models.loading import load_checkpoint
from coordexp.rollout.hf_engine import HfEngine
from coordexp.training import loop, rollout_pool
from coordexp.training.distributed import any_process, world
from coordexp.training.stage1 import train_stage1
from coordexp.training.stage2 import train_stage2
from coordexp.training.stage2_task import Stage2Task
from coordexp.training.step import TeacherTask

STAGES = {"stage1": train_stage1, "stage2": train_stage2}
HELD: list[float] = []


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def watch_memory() -> None:
    """Record the fraction of weights and moments that this process holds after each step."""
    clipped = loop._clipped_norm

    def noting(model, limit):
        norm = clipped(model, limit)
        tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        HELD.append(sum(local(t).numel() for t in tensors) / sum(t.numel() for t in tensors))
        return norm

    loop._clipped_norm = noting


def stop_in(step: int | None) -> None:
    for kind, original in ORIGINALS.items():

        def micro_batches(self, current, original=original):
            if current == step and world().rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, current)

        kind.micro_batches = micro_batches


ORIGINALS = {kind: kind.micro_batches for kind in (TeacherTask, Stage2Task)}


def answer_in_memory(_profile, _form, folder, image_root, batch_images, samples, request):
    """In place of servers: the checkpoint that they would serve generates in memory."""
    engine = HfEngine(load_checkpoint(folder), image_root, batch_images)
    return engine.generate(samples, request), None, 0.0


def run(entry: dict[str, Any]) -> None:
    os.environ["DVC_ROOT"] = entry["root"]
    os.environ["LOCAL_WORLD_SIZE"] = str(world().size // entry["nodes"])
    HELD.clear()
    stop_in(entry["stop_in"])
    try:
        STAGES[entry["stage"]](
            RunConfig(
                params=Params.model_validate(entry["params"]),
                profile=Profile.model_validate(entry["profile"]),
                paths=ProfilePaths("smoke", Path(entry["root"])),
            )
        )
    except Interrupted:
        assert entry["stop_in"] is not None
    else:
        assert entry["stop_in"] is None
    if world().is_main:
        (Path(entry["root"]) / "held.json").write_text(json.dumps(HELD))
    any_process(False)  # wait for the others


if __name__ == "__main__":
    torch.set_num_threads(1)
    watch_memory()
    rollout_pool.generate_answers = answer_in_memory
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run(entry)
