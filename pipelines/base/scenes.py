"""Compose the scenes of the base model's curriculum: `python -m pipelines.base.scenes`."""

from __future__ import annotations

import os
from pathlib import Path

from ruamel.yaml import YAML

from coordexp.config.profile import ScenesConfig
from toyworld.coco_folder import write_coco_folder

HOME = Path("pipelines/base")


def main() -> None:
    """One COCO folder per curriculum phase."""
    params = YAML(typ="safe").load(HOME / "params.yaml")
    common = {"kind": "scenes", "sprites": params["sprites"], "val_images": 1, "held_out_fraction": 0.0}
    for i, (phase, options) in enumerate(params["phases"].items()):
        source = ScenesConfig.model_validate(common | options["scenes"] | {"seed_offset": i})
        write_coco_folder(HOME / "data" / phase, source, params["seed"], os.cpu_count() or 1)
        print(f"{phase}: {source.train_images} scenes")


if __name__ == "__main__":
    main()
