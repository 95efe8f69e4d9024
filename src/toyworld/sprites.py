"""The sprites, their labels, and the tiers that limit which labels training may use.

A label is a noun ("cat"), rendered in its natural colors, or a color and a noun ("red cat"), rendered tinted. Its tier
specifies how training may use it. `data/sprites/labels.json` holds the tiers; the README.md next to it defines them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordexp.errors import DataError
from coordexp.records.categories import Split
from coordexp.records.images import open_image

Color = tuple[int, int, int]  # RGB, 0..255
LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601
# Luminance is mapped into this range before tinting, because the color of a deep shadow or a highlight is invisible.
DARKEST, LIGHTEST = 0.12, 0.78


def tinted(pixels: NDArray[np.float32], color: Color) -> NDArray[np.float32]:
    """RGBA pixels (colors 0..255) in shades of one color, with their luminance mapped to DARKEST..LIGHTEST."""
    luma = DARKEST + (LIGHTEST - DARKEST) * (_luma(pixels) / 255)
    rgb = np.array(color, np.float32) / 255
    own = float(_luma(rgb))
    shade = rgb * (np.minimum(luma, own) / own)[..., None]  # from black to the color, then from the color to white
    shade += (1 - shade) * ((np.maximum(luma, own) - own) / (1 - own))[..., None]
    return np.concatenate([255 * shade, pixels[..., 3:]], axis=-1)


def _luma(rgb: NDArray[np.floating]) -> NDArray[np.floating]:
    """The luminance of colors in the last axis.

    Not a matrix product: the library behind it adds in another order, or with other roundings, on other processors, and
    the composed images would differ.
    """
    red, green, blue = (np.float32(weight) * rgb[..., channel] for channel, weight in enumerate(LUMA))
    return red + green + blue


@dataclass(frozen=True, slots=True)
class Label:
    """The name of an object; `color` is None for a noun in its natural colors."""

    noun: str
    color: str | None
    tier: Split

    @property
    def name(self) -> str:
        """The name in annotations and prompts."""
        return self.noun if self.color is None else f"{self.color} {self.noun}"


@dataclass(frozen=True, slots=True)
class Sprite:
    """One RGBA image cropped to its opaque part, so that its frame is the tight box of the object."""

    name: str
    noun: str
    rgba: Image.Image

    def render(self, longer_side_px: int, flip: bool, color: Color | None = None) -> NDArray[np.float32]:
        """Scale to the given longer side, and tint; returns float RGBA (h, w, 4), colors 0..255 and alpha 0..1."""
        factor = longer_side_px / max(self.rgba.size)
        width, height = (max(2, round(side * factor)) for side in self.rgba.size)
        image = self.rgba.resize((width, height), Image.Resampling.BOX if factor < 1 else Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels[:, ::-1] if flip else pixels
        pixels = np.concatenate([pixels[..., :3], pixels[..., 3:] / 255.0], axis=-1)
        return pixels if color is None else tinted(pixels, color)


@dataclass(frozen=True)
class SpriteCatalog:
    """All sprites by noun, the colors, and every label."""

    sprites: dict[str, tuple[Sprite, ...]]
    colors: dict[str, Color]
    labels: tuple[Label, ...]

    def color_of(self, label: Label) -> Color | None:
        """The tint of a label's sprites."""
        return None if label.color is None else self.colors[label.color]

    @cached_property
    def tiers(self) -> dict[Split, tuple[Label, ...]]:
        """The labels by tier, without empty tiers."""
        return {t: group for t in get_args(Split) if (group := tuple(i for i in self.labels if i.tier == t))}

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Colors and nouns of the training text, each once."""
        nouns = dict.fromkeys(label.noun for label in self.tiers["train"])
        return (*self.colors, *nouns)


def load_catalog(folder: Path) -> SpriteCatalog:
    """Read `catalog.json`, its sprites and `labels.json`.

    Raises:
        DataError: a file is missing, a sprite's hash differs, or a label has a noun without sprites.
    """
    sprites: dict[str, list[Sprite]] = {}
    for row in _read(folder / "catalog.json"):
        path = folder / row["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
            raise DataError(f"{path}: missing, or its sha256 differs from catalog.json. Restore the file from git.")
        with open_image(path) as image:
            sprites.setdefault(row["noun"], []).append(Sprite(row["file"], row["noun"], image.convert("RGBA")))
    declared = _read(folder / "labels.json")
    colors: dict[str, Color] = {name: (r, g, b) for name, (r, g, b) in declared["colors"].items()}
    labels = tuple(label for row in declared["nouns"] for label in labels_of(row, tuple(colors)))
    if bare := sorted({label.noun for label in labels} - sprites.keys()):
        raise DataError(
            f"{folder / 'labels.json'}: catalog.json has no sprite for {', '.join(bare)}. Restore both files from git."
        )
    return SpriteCatalog({noun: tuple(group) for noun, group in sprites.items()}, colors, labels)


def labels_of(row: Mapping[str, Any], colors: Sequence[str]) -> list[Label]:
    """The labels of one noun: in each color, and plain if that is allowed."""
    noun, use = row["noun"], row["use"]
    if use == "colored":
        tier_of: dict[str, Split] = {c: "strict" for c in row["strict"]} | {c: "phrase" for c in row["phrase"]}
        plain = [Label(noun, None, "train")] if row["plain"] else []
        return [*plain, *(Label(noun, color, tier_of.get(color, "train")) for color in colors)]
    tier: Split = "plain_only" if use == "plain_only" else "never"
    return [Label(noun, None, "train" if use == "plain_only" else tier), *(Label(noun, c, tier) for c in colors)]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: not found. Set source.sprites to the folder that holds the sprites and their labels.")
    return json.loads(path.read_text(encoding="utf-8"))
