"""Build the report: Markdown, figures and gallery from the files of the other stages."""

from __future__ import annotations

from coordexp.config.run import RunConfig
from coordexp.reporting.inputs import ReportInputs
from coordexp.reporting.provenance import experiment_baseline
from coordexp.reporting.report import build_report
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Write `progress.md` with its figures."""
    inputs = ReportInputs.of(context, experiment_baseline(context.paths.profile))
    LOG.info("report: %s", build_report(inputs, context.paths.reports))


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
