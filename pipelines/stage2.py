"""The EM update: channel A on ground truth, channel B on matched rollouts."""

from __future__ import annotations

from coordexp.config.run import RunConfig
from coordexp.stage import LOG, stage_main
from coordexp.training.distributed import world
from coordexp.training.launch import run_in_processes
from coordexp.training.session import write_curve
from coordexp.training.stage2 import train_stage2


def run(context: RunConfig) -> None:
    """Train; write the checkpoint, its compute, and the curve for `dvc plots`."""
    if run_in_processes(context.profile.launch.processes):
        return  # the processes that it started have finished this stage
    summary = train_stage2(context)
    if world().is_main:
        write_curve(context.paths.run("stage2") / "train_log.jsonl", context.paths.curve("stage2"))
    LOG.info("stage2: %s", summary)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
