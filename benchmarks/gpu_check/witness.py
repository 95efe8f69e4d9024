"""Run stages as separate processes do, and record the device on which each model computed.

    python -m benchmarks.gpu_check.witness --report devices.json [options of a stage] STAGE ...

A stage is the name of its file in pipelines/, `decode:NAME` with the checkpoint. One that fails is the last.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from coordexp.config.paths import CHECKPOINTS
from coordexp.stage import stage_main


def main() -> int:
    """Run the stages; returns the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    for option in ("--params", "--profile", "--out"):
        parser.add_argument(option, required=True)
    parser.add_argument("stages", nargs="+", metavar="STAGE")
    arguments = parser.parse_args()
    options = ["--params", arguments.params, "--profile", arguments.profile, "--out", arguments.out]
    devices: dict[str, set[str]] = {}
    running = ""

    def note(module: nn.Module, _: object) -> None:
        if isinstance(module, Qwen3VLModel):
            devices.setdefault(running, set()).add(next(module.parameters()).device.type)

    register_module_forward_pre_hook(note)
    for running in arguments.stages:
        stage, _, name = running.partition(":")
        run = importlib.import_module(f"pipelines.{stage}").run
        code = stage_main(run, [*options, name] if name else options, CHECKPOINTS if name else ())
        if code:
            return code
    found = {stage: sorted(kinds) for stage, kinds in devices.items()}
    arguments.report.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
