"""Compose the scenes of the embedded profile as a COCO folder with a manifest."""

from __future__ import annotations

import os
from pathlib import Path

from coordexp.config.process import StageContext, stage_main
from coordexp.config.provenance import file_hash, write_json
from coordexp.records.scenes.coco_folder import write_coco_folder
from coordexp.records.scenes.composer import SceneSpec


def run(context: StageContext) -> None:
    """Compose scenes from the seed; write images, annotations and a manifest of counts and hashes."""
    source, out = context.profile.source, context.paths.raw
    spec = SceneSpec(**source.model_dump(include=set(SceneSpec.__slots__)))
    objects = write_coco_folder(
        out,
        spec,
        Path(source.sprites),
        context.params.seed + source.seed_offset,
        {"train": source.train_images, "val": source.val_images},
        workers=os.cpu_count() or 1,
    )
    annotations = {path.name: file_hash(path) for path in sorted((out / "annotations").iterdir())}
    images = {"train": source.train_images, "val": source.val_images}
    write_json(out / "manifest.json", {"images": images, "objects": objects, "annotations": annotations})
    context.log.info("raw: %s images, %s objects", images, objects)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
