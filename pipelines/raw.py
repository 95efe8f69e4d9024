"""Provide the source data: compose scenes as a COCO folder, or use data sets on disk; write an inventory of either."""

from __future__ import annotations

from coordexp.config.profile import ScenesConfig
from coordexp.config.run import RunConfig
from coordexp.infra.artefacts import sealing
from coordexp.infra.workers import worker_count
from coordexp.records.manifest import write_manifest
from coordexp.stage import LOG, stage_main
from toyworld.coco_folder import as_datasets, write_coco_folder


def run(context: RunConfig) -> None:
    """Write `data/<profile>/raw`: a manifest of the images, which are not copied, and the shards of composed ones."""
    raw, source, workers = context.paths.raw, context.profile.source, worker_count()
    with sealing(raw):
        if isinstance(source, ScenesConfig):
            write_coco_folder(raw / "images", source, context.params.seed, workers)
            source = as_datasets(raw / "images")
        manifest = write_manifest(raw, source.sets, source.verify == "decode", workers)
    for name, found in manifest["sets"].items():
        problems = ", ".join(f"{reason} {n}" for reason, n in found["problems"].items()) or "no problem"
        LOG.info("raw: %s: %d images, %d bytes, %s", name, found["images"], found["bytes"], problems)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
