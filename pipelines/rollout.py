"""Stage-1 answers on training images, parsed and matched."""

from __future__ import annotations

from coordexp.config.process import StageContext, stage_main
from coordexp.rollout.stages import run_rollouts


def run(context: StageContext) -> None:
    """Generate, re-score, parse, match; write the hand-over file, the rollouts and a summary."""
    summary = run_rollouts(context.params, context.profile, context.paths)
    shown = (f"{name} {'undefined' if value is None else value}" for name, value in summary.items())
    context.log.info("rollout: %s", ", ".join(shown))


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
