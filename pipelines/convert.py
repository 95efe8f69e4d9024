"""COCO annotations to records, split into train, dev and val."""

from __future__ import annotations

from dataclasses import asdict

from coordexp.config.process import StageContext, stage_main
from coordexp.config.provenance import write_json
from coordexp.records.schema import write_records
from coordexp.records.sources.coco import read_coco
from coordexp.records.splits import split_dev


def run(context: StageContext) -> None:
    """Convert both annotation files, take dev out of train, and count what was dropped."""
    raw, out = context.paths.raw, context.paths.records
    out.mkdir(parents=True, exist_ok=True)
    source = read_coco(raw / "annotations" / "instances_train.json", "images/train/")
    val = read_coco(raw / "annotations" / "instances_val.json", "images/val/")
    train, dev = split_dev(source.records, context.profile.records.dev_images)
    for name, records in (("train", train), ("dev", dev), ("val", val.records)):
        write_records(out / f"{name}.jsonl", records)
        context.log.info("%s: %d images, %d objects", name, len(records), sum(len(r.objects) for r in records))
    write_json(out / "categories.json", [asdict(c) for c in val.categories])
    write_json(out / "drops.json", {"train": source.drops, "val": val.drops})


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
