"""Plan the packed sequences of the training split."""

from __future__ import annotations

from coordexp.config.run import RunConfig
from coordexp.infra.artefacts import sealing
from coordexp.infra.provenance import write_json
from coordexp.packing.planner import plan_packs, plan_stats, write_plan
from coordexp.packing.samples import SampleStore
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Write the plan and its fill statistics."""
    out = context.paths.packed
    lengths = SampleStore(context.paths.norm1000 / "train.parquet").lengths()
    plan = plan_packs(lengths, context.profile.packing.pack_tokens, context.params.seed)
    stats = plan_stats(plan)
    with sealing(out):
        write_plan(out / "plan.parquet", plan)
        write_json(out / "stats.json", stats)
    LOG.info("pack: %s", stats)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
