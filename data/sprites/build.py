"""Rebuild the committed sprites from the unpacked npm package `@lobehub/fluent-emoji-3d@1.1.0` (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python data/sprites/build.py package/assets

Each sprite is cropped to its opaque part and stored with a longer side of 96 px. `catalog.json` is the manifest: code
point, desc, split and sha256. Descs in the split "held_out" are composed into val scenes only.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIDE_PX = 96
MIN_ALPHA = 24

SEEN: dict[str, str] = {
    "cat": "1f408 1f408-200d-2b1b",
    "dog": "1f415 1f429 1f415-200d-1f9ba",
    "cow": "1f404 1f402",
    "horse": "1f40e",
    "rabbit": "1f407",
    "pig": "1f416 1f417",
    "elephant": "1f418",
    "monkey": "1f412",
    "bear": "1f43b 1f43b-200d-2744-fe0f 1f43c",
    "penguin": "1f427",
    "bird": "1f426 1f99c 1f426-200d-2b1b",
    "duck": "1f986",
    "fish": "1f420 1f41f 1f421",
    "whale": "1f433 1f40b",
    "octopus": "1f419",
    "crab": "1f980 1f99e",
    "turtle": "1f422",
    "snake": "1f40d",
    "frog": "1f438",
    "butterfly": "1f98b",
    "ladybug": "1f41e",
    "car": "1f697 1f699 1f695",
    "bus": "1f68c 1f690 1f68e",
    "truck": "1f69a 1f69b 1f6fb",
    "bicycle": "1f6b2",
    "motorcycle": "1f6f5 1f3cd-fe0f",
    "airplane": "2708-fe0f 1f6e9-fe0f",
    "rocket": "1f680",
    "boat": "26f5 1f6a4",
    "apple": "1f34e 1f34f",
    "banana": "1f34c",
    "orange": "1f34a",
    "strawberry": "1f353",
    "grapes": "1f347",
    "carrot": "1f955",
    "mushroom": "1f344",
    "bread": "1f35e 1f950 1f956",
    "pizza": "1f355",
    "burger": "1f354",
    "donut": "1f369",
    "cake": "1f370 1f382 1f9c1",
    "cup": "2615 1f375",
    "tree": "1f332 1f333 1f334",
    "flower": "1f337 1f339 1f33b 1f33a",
    "cactus": "1f335",
    "hat": "1f3a9 1f452 1f9e2",
    "shoe": "1f45e 1f45f 1f97e",
    "bag": "1f45c 1f45b 1f392",
    "shirt": "1f455 1f3bd",
    "ball": "1f3c0 26bd 26be 1f3d0",
    "guitar": "1f3b8",
    "camera": "1f4f7 1f4f8",
    "chair": "1fa91",
    "umbrella": "2602-fe0f 26f1-fe0f",
}
HELD_OUT: dict[str, str] = {"tractor": "1f69c", "lemon": "1f34b", "violin": "1f3bb", "flamingo": "1f9a9"}


def crop_and_scale(image: Image.Image) -> Image.Image:
    """Crop to alpha > 24 and scale the longer side to 96 px, so that the sprite's frame is its box."""
    opaque = np.asarray(image.getchannel("A")) > MIN_ALPHA
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    cropped = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    factor = SIDE_PX / max(cropped.size)
    return cropped.resize([max(1, round(side * factor)) for side in cropped.size], Image.Resampling.LANCZOS)


def main(assets: Path, out: Path) -> None:
    rows = []
    for split, names in (("train", SEEN), ("held_out", HELD_OUT)):
        for desc, code_points in names.items():
            for code_point in code_points.split():
                target = out / f"{code_point}.webp"
                crop_and_scale(Image.open(assets / f"{code_point}.webp").convert("RGBA")).save(
                    target, quality=88, method=6
                )
                digest = hashlib.sha256(target.read_bytes()).hexdigest()
                rows.append({"file": target.name, "desc": desc, "split": split, "sha256": digest})
    (out / "catalog.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} sprites, {len(SEEN)} + {len(HELD_OUT)} descs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
