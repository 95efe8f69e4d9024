"""Make the source data present: compose the scenes of the embedded profile, or take stock of data sets on disk."""

from __future__ import annotations

import os
from pathlib import Path

from coordexp.config.profile import DatasetsConfig, SourceConfig
from coordexp.config.run import RunConfig
from coordexp.infra.provenance import file_hash, write_json
from coordexp.records.manifest import MANIFEST, write_manifest
from coordexp.records.scenes.coco_folder import write_coco_folder
from coordexp.records.scenes.composer import SceneSpec
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Write `data/<profile>/raw`: composed scenes, or a manifest of images that stay where they are."""
    source: SourceConfig | DatasetsConfig = context.profile.source
    if isinstance(source, DatasetsConfig):
        _take_stock(context, source)
    else:
        _compose(context, source)


def _take_stock(context: RunConfig, source: DatasetsConfig) -> None:
    manifest = write_manifest(context.paths.raw, source.sets, source.verify == "decode", workers=os.cpu_count() or 1)
    for name, found in manifest["sets"].items():
        problems = ", ".join(f"{reason} {n}" for reason, n in found["problems"].items()) or "no problem"
        LOG.info("raw: %s: %d images, %d bytes, %s", name, found["images"], found["bytes"], problems)


def _compose(context: RunConfig, source: SourceConfig) -> None:
    spec = SceneSpec(**source.model_dump(include=set(SceneSpec.__slots__)))
    out = context.paths.raw
    made = write_coco_folder(
        out,
        spec,
        Path(source.sprites),
        context.params.seed + source.seed_offset,
        {"train": source.train_images, "val": source.val_images},
        workers=os.cpu_count() or 1,
    )
    annotations = {path.name: file_hash(path) for path in sorted((out / "annotations").iterdir())}
    write_json(out / MANIFEST, made | {"annotations": annotations})
    LOG.info("raw: %s images, %s objects", made["images"], made["objects"])


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
