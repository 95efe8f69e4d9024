"""Stage-1 answers on training images, parsed and matched."""

from __future__ import annotations

from coordexp.config.run import RunConfig
from coordexp.rollout.stages import run_rollouts
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Generate, re-score, parse, match; write the hand-over file, the rollouts and a summary."""
    summary = run_rollouts(context)
    shown = (f"{name} {'undefined' if value is None else value}" for name, value in summary.items())
    LOG.info("rollout: %s", ", ".join(shown))


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
