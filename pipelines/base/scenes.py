"""Compose the scenes of the base model's curriculum: `python -m pipelines.base.scenes`."""

from __future__ import annotations

import os
from pathlib import Path

from ruamel.yaml import YAML

from coordexp.records.scenes.coco_folder import write_coco_folder
from coordexp.records.scenes.composer import SceneSpec

ROOT = Path("pipelines/base/data")


def main() -> None:
    """One COCO folder per curriculum phase."""
    params = YAML(typ="safe").load(Path("pipelines/base/params.yaml"))
    for i, (phase, options) in enumerate(params["phases"].items()):
        scenes = dict(options["scenes"])
        images = scenes.pop("images")
        spec = SceneSpec(held_out_fraction=0.0, **scenes)
        seed = params["seed"] + i
        write_coco_folder(ROOT / phase, spec, Path(params["sprites"]), seed, {"train": images}, os.cpu_count() or 1)
        print(f"{phase}: {images} scenes")


if __name__ == "__main__":
    main()
