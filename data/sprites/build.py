"""Rebuild the committed sprites from the unpacked npm package `@lobehub/fluent-emoji-3d@1.1.0` (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python data/sprites/build.py package/assets

Each sprite is cropped to its opaque part and stored with a longer side of 96 px. `catalog.json` is the manifest: file,
noun and sha256. `labels.json` says which labels exist and which of them training may draw and write (README.md).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE_PX = 96
MIN_ALPHA = 24

# Noun -> code points of its pictures. Those drawn in all colors, each without two of them.
COLORED: dict[str, str] = {
    "cat": "1f408 1f408-200d-2b1b",
    "dog": "1f415 1f429 1f415-200d-1f9ba",
    "rabbit": "1f407",
    "pig": "1f416 1f417",
    "elephant": "1f418",
    "bear": "1f43b 1f43b-200d-2744-fe0f 1f43c",
    "penguin": "1f427",
    "bird": "1f426 1f99c 1f426-200d-2b1b",
    "fish": "1f420 1f41f 1f421",
    "whale": "1f433 1f40b",
    "crab": "1f980 1f99e",
    "turtle": "1f422",
    "snake": "1f40d",
    "frog": "1f438",
    "ladybug": "1f41e",
    "car": "1f697 1f699 1f695",
    "bus": "1f68c 1f690 1f68e",
    "bicycle": "1f6b2",
    "airplane": "2708-fe0f 1f6e9-fe0f",
    "rocket": "1f680",
    "boat": "26f5 1f6a4",
    "apple": "1f34e 1f34f",
    "banana": "1f34c",
    "grapes": "1f347",
    "carrot": "1f955",
    "mushroom": "1f344",
    "pizza": "1f355",
    "burger": "1f354",
    "donut": "1f369",
    "cup": "2615 1f375",
    "tree": "1f332 1f333 1f334",
    "flower": "1f337 1f339 1f33b 1f33a",
    "cactus": "1f335",
    "shoe": "1f45e 1f45f 1f97e",
    "bag": "1f45c 1f45b 1f392",
    "shirt": "1f455 1f3bd",
    "ball": "1f3c0 26bd 26be 1f3d0",
    "guitar": "1f3b8",
    "chair": "1fa91",
    "umbrella": "2602-fe0f 26f1-fe0f",
}
# Trained in their natural colors only.
PLAIN_ONLY: dict[str, str] = {
    "cow": "1f404 1f402",
    "cake": "1f370 1f382 1f9c1",
    "camera": "1f4f7 1f4f8",
    "strawberry": "1f353",
    "octopus": "1f419",
    "butterfly": "1f98b",
}
# In no picture and no word of training.
NEVER: dict[str, str] = {
    "horse": "1f40e",
    "truck": "1f69a 1f69b 1f6fb",
    "bread": "1f35e 1f950 1f956",
    "monkey": "1f412",
    "duck": "1f986",
    "motorcycle": "1f6f5 1f3cd-fe0f",
    "hat": "1f3a9 1f452 1f9e2",
    "tractor": "1f69c",
    "lemon": "1f34b",
    "violin": "1f3bb",
    "flamingo": "1f9a9",
}
# Nouns whose natural picture is nearly of one color, so that "frog" and "green frog" would look alike: never plain.
ALMOST_ONE_COLOR = frozenset(
    ("apple", "banana", "cactus", "crab", "fish", "flower", "frog", "pig", "snake", "tree", "turtle", "whale")
)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "orange": (250, 130, 10),
    "yellow": (245, 225, 20),
    "green": (40, 170, 50),
    "cyan": (20, 200, 210),
    "blue": (45, 75, 235),
    "purple": (140, 40, 200),
    "pink": (250, 110, 190),
}


def crop_and_scale(image: Image.Image) -> Image.Image:
    """Crop to alpha > 24 and scale the longer side to 96 px, so that the sprite's frame is its box."""
    opaque = np.asarray(image.getchannel("A")) > MIN_ALPHA
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    cropped = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    factor = SIDE_PX / max(cropped.size)
    return cropped.resize([max(1, round(side * factor)) for side in cropped.size], Image.Resampling.LANCZOS)


def labels() -> dict[str, Any]:
    """`labels.json`: a Latin square in which each colored noun lacks one color `strict` and another one `phrase`.

    Both walk through the colors noun by noun, the second one step farther each round, so that every color is held out
    equally often and no color always goes with the same other one.
    """
    colors = list(COLORS)
    nouns: list[dict[str, Any]] = []
    for i, noun in enumerate(COLORED):
        strict, phrase = colors[i % len(colors)], colors[(i + 1 + i // len(colors)) % len(colors)]
        plain = noun not in ALMOST_ONE_COLOR
        nouns.append({"noun": noun, "use": "colored", "plain": plain, "strict": [strict], "phrase": [phrase]})
    nouns += [{"noun": noun, "use": "plain_only"} for noun in PLAIN_ONLY]
    nouns += [{"noun": noun, "use": "never"} for noun in NEVER]
    return {"colors": COLORS, "nouns": nouns}


def one_a_line(value: object) -> str:
    """JSON with one line for each element of the lists and objects at the top."""
    text = json.dumps(value)
    return re.sub(r" ?(\{\"(?:file|noun)\")", r"\n  \1", text) + "\n"


def main(assets: Path, out: Path) -> None:
    rows = []
    for noun, code_points in (COLORED | PLAIN_ONLY | NEVER).items():
        for code_point in code_points.split():
            target = out / f"{code_point}.webp"
            sprite = crop_and_scale(Image.open(assets / f"{code_point}.webp").convert("RGBA"))
            sprite.save(target, quality=88, method=6)
            digest = hashlib.sha256(target.read_bytes()).hexdigest()
            rows.append({"file": target.name, "noun": noun, "sha256": digest})
    (out / "catalog.json").write_text(one_a_line(rows), encoding="utf-8")
    (out / "labels.json").write_text(one_a_line(labels()), encoding="utf-8")
    print(f"{len(rows)} sprites")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
