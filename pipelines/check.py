"""Check all parameters before any stage runs, and write those of each stage to `inputs/<profile>/<stage>.json`."""

from __future__ import annotations

from pathlib import Path

from coordexp.config.run import RunConfig
from coordexp.inputs import write_inputs
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Write the files of the stages whose parameters changed."""
    changed = write_inputs(context, Path())
    LOG.info("check: parameters are valid; changed for %s", ", ".join(changed) or "no stage")


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
