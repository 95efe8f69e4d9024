"""Annotations to records, split into train, dev and val."""

from __future__ import annotations

import json
from dataclasses import asdict

from coordexp.config.run import RunConfig
from coordexp.infra.files import replacing
from coordexp.infra.provenance import write_json
from coordexp.records.convert import Converted, convert_datasets, policies_of
from coordexp.records.images import image_roots
from coordexp.records.losses import refuse_empty, refuse_losses
from coordexp.records.manifest import SPLITS
from coordexp.records.policy import SHOWN
from coordexp.records.schema import write_records
from coordexp.records.sources.coco import read_coco
from coordexp.records.splits import split_dev
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Write one JSONL for each split, the categories, and every annotation that was dropped with its reason."""
    raw, out = context.paths.raw, context.paths.records
    out.mkdir(parents=True, exist_ok=True)
    if image_roots(raw):
        converted = convert_datasets(raw, context.profile.records, context.params.seed)
        drops = converted.drops()
        for note in converted.notes[:SHOWN]:
            LOG.warning("names: %s", note)
        if len(converted.notes) > SHOWN:
            LOG.warning("names: and %d more", len(converted.notes) - SHOWN)
        write_json(out / "sets.json", converted.sets)
        with replacing(out / "dropped.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for split, problems in converted.problems.items():
                file.writelines(json.dumps({"split": split} | asdict(p), ensure_ascii=False) + "\n" for p in problems)
    else:
        converted, drops = _scenes(context)
    for name, records in converted.splits.items():
        write_records(out / f"{name}.jsonl", records)
        LOG.info("%s: %d records, %d objects", name, len(records), sum(len(r.objects) for r in records))
    write_json(out / "categories.json", [c.to_json() for c in converted.categories])
    write_json(out / "drops.json", drops)
    LOG.info("dropped: %s", drops)


def _scenes(context: RunConfig) -> tuple[Converted, dict[str, dict[str, int]]]:
    """The composed scenes: a COCO folder that holds its own images."""
    policies = {split: policies_of(context.profile.records, split) for split in SPLITS}
    folder = context.paths.raw / "annotations"
    found = {s: read_coco(folder / f"instances_{s}.json", f"images/{s}/", policies[s]) for s in SPLITS}
    refuse_losses({f"scenes/{s}": (found[s], policies[s]) for s in SPLITS})
    train, dev = split_dev(found["train"].records, context.profile.records.dev_images)
    splits = {"train": train, "dev": dev, "val": found["val"].records}
    refuse_empty(splits)
    return Converted(splits, list(found["val"].categories)), {s: found[s].drops for s in SPLITS}


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
