"""Compose the scenes of the base model's curriculum and of its dev set: `python -m pipelines.base.scenes`."""

from __future__ import annotations

import os
from pathlib import Path

from ruamel.yaml import YAML

from coordexp.config.profile import ScenesConfig
from toyworld.coco_folder import write_coco_folder

HOME = Path("pipelines/base")
DEV_SEED_OFFSET = 100
DEV_HELD_OUT = {"strict": 0.3, "phrase": 0.25, "plain_only": 0.03, "never": 0.03}
COMMON = {
    "plain_fraction": 0.15,
    "min_objects": 1,
    "count_decay": 0.8,
    "max_iou": 0.35,
    "rows": {
        **{"most": 1, "objects": 6, "closest": 0.75, "farthest": 1.1},
        **{"smallest_fraction": 0.14, "largest_fraction": 0.26},
    },
}
NOTHING_HELD_OUT = dict.fromkeys(DEV_HELD_OUT, 0.0)


def main() -> None:
    """Write one COCO folder per curriculum phase, and `dev`."""
    params = YAML(typ="safe").load(HOME / "params.yaml")
    common = {"kind": "scenes", "sprites": params["sprites"]} | COMMON
    for i, (phase, options) in enumerate(params["phases"].items()):
        keys = common | {"val_images": 1, "held_out": NOTHING_HELD_OUT, "seed_offset": i} | options["scenes"]
        source = ScenesConfig.model_validate(keys)
        write_coco_folder(
            HOME / "data" / phase, source, params["seed"], os.cpu_count() or 1, unwritten=options["unwritten"]
        )
        print(f"{phase}: {source.train_images} scenes", flush=True)
    keys = common | {"held_out": DEV_HELD_OUT, "seed_offset": DEV_SEED_OFFSET} | params["dev"]["scenes"]
    write_coco_folder(HOME / "data" / "dev", ScenesConfig.model_validate(keys), params["seed"], 1)


if __name__ == "__main__":
    main()
