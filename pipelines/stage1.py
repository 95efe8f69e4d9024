"""Teacher-forced training on packed sequences."""

from __future__ import annotations

from coordexp.config.process import StageContext, stage_main
from coordexp.training.session import write_curve
from coordexp.training.stage1 import train_stage1


def run(context: StageContext) -> None:
    """Train, write the checkpoint and the curve that dvc plots draws."""
    summary = train_stage1(context.params, context.profile, context.paths)
    write_curve(context.paths.run("stage1") / "train_log.jsonl", context.paths.curve("stage1"))
    context.log.info("stage1: %s", summary)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
