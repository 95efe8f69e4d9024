"""Convert annotations to records, split into train, dev and val."""

from __future__ import annotations

import json
from dataclasses import asdict

from coordexp.config.run import RunConfig
from coordexp.infra.artefacts import sealing
from coordexp.infra.files import replacing
from coordexp.infra.provenance import write_json
from coordexp.infra.workers import worker_count
from coordexp.records.convert import convert_datasets, write_split
from coordexp.records.losses import SHOWN
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Write one JSONL per split, the categories, and every dropped annotation with its reason.

    Objects that `records.missing` removes from training go to `left_out.jsonl`, for evaluations of their effect.
    """
    workers = worker_count()
    converted = convert_datasets(context.paths.raw, context.profile.records, context.params.seed, workers)
    with sealing(context.paths.records) as out:
        for name, records in converted.splits.items():
            n_objects = write_split(out / f"{name}.jsonl", records, workers)
            LOG.info("%s: %d records, %d objects", name, len(records), n_objects)
        if context.profile.records.missing:
            n_objects = write_split(out / "left_out.jsonl", converted.left_out, workers)
            LOG.info("left out: %d objects of train", n_objects)
        write_json(out / "categories.json", [c.to_json() for c in converted.categories()])
        write_json(out / "sets.json", converted.sets())
        write_json(out / "drops.json", converted.drops())
        with replacing(out / "dropped.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for split, problems in converted.problems.items():
                file.writelines(json.dumps({"split": split} | asdict(p), ensure_ascii=False) + "\n" for p in problems)
    for note in converted.notes[:SHOWN]:
        LOG.warning("names: %s", note)
    if len(converted.notes) > SHOWN:
        LOG.warning("names: and %d more", len(converted.notes) - SHOWN)
    LOG.info("dropped: %s", converted.drops())


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
