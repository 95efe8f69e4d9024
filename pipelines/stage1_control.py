"""The control of stage 2: stage 1 continued for the same optimizer compute."""

from __future__ import annotations

from coordexp.config.run import RunConfig
from coordexp.stage import LOG, stage_main
from coordexp.training.distributed import world
from coordexp.training.launch import run_in_processes
from coordexp.training.session import write_curve
from coordexp.training.stage1 import train_control


def run(context: RunConfig) -> None:
    """Train; write the checkpoint and the curve for `dvc plots`."""
    if run_in_processes(context.profile.launch.processes):
        return  # the processes that it started have finished this stage
    summary = train_control(context)
    if world().is_main:
        write_curve(context.paths.run("stage1-control") / "train_log.jsonl", context.paths.curve("stage1-control"))
    LOG.info("stage1-control: %s", summary)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
