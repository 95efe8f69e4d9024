"""Generate the answers of stage 1 on training images."""

from __future__ import annotations

from coordexp.config.run import RunConfig
from coordexp.rollout.stages import run_rollouts
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Generate and write the answers; stage 2 matches them."""
    LOG.info("rollout: answers on %d images", run_rollouts(context))


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
