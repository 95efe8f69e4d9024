"""Stage-1 answers on training images, parsed and matched."""

from __future__ import annotations

from coordexp.config.process import StageContext, stage_main
from coordexp.rollout.stages import run_rollouts


def run(context: StageContext) -> None:
    """Generate, re-score, parse, match; write the hand-over file, the rollouts and a summary."""
    context.log.info("rollout: %s", run_rollouts(context.params, context.profile, context.paths))


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
