"""The sprite catalogue: which pictures exist, what they are called, and which names are held out from training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordexp.errors import DataError
from coordexp.records.images import open_image


@dataclass(frozen=True, slots=True)
class Sprite:
    """One RGBA picture cropped to its opaque part, so that its frame is the tight box of the object."""

    name: str
    desc: str
    rgba: Image.Image

    def render(self, longer_side_px: int, flip: bool) -> NDArray[np.float32]:
        """Scale to the given longer side; returns float RGBA (h, w, 4), colours 0..255 and alpha 0..1."""
        factor = longer_side_px / max(self.rgba.size)
        width, height = (max(2, round(side * factor)) for side in self.rgba.size)
        image = self.rgba.resize((width, height), Image.Resampling.BOX if factor < 1 else Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels[:, ::-1] if flip else pixels
        return np.concatenate([pixels[..., :3], pixels[..., 3:] / 255.0], axis=-1)


@dataclass(frozen=True, slots=True)
class SpriteCatalog:
    """All sprites by description, and the descriptions of each split."""

    sprites: dict[str, tuple[Sprite, ...]]
    seen: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def descs(self) -> tuple[str, ...]:
        """Every description, seen first: the category list of the composed data."""
        return self.seen + self.held_out


def load_catalog(folder: Path) -> SpriteCatalog:
    """Read `catalog.json` and its sprites; raises DataError for a missing file or one whose hash differs."""
    manifest = folder / "catalog.json"
    if not manifest.is_file():
        raise DataError(
            f"{manifest}: not found; expected the sprite manifest. Set source.sprites to the folder that holds it."
        )
    sprites: dict[str, list[Sprite]] = {}
    splits: dict[str, str] = {}
    for row in json.loads(manifest.read_text(encoding="utf-8")):
        path = folder / row["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
            raise DataError(f"{path}: missing, or its sha256 differs from {manifest}. Restore the file from git.")
        with open_image(path) as image:
            sprites.setdefault(row["desc"], []).append(Sprite(row["file"], row["desc"], image.convert("RGBA")))
        splits[row["desc"]] = row["split"]
    return SpriteCatalog(
        sprites={desc: tuple(group) for desc, group in sprites.items()},
        seen=tuple(desc for desc, split in splits.items() if split == "train"),
        held_out=tuple(desc for desc, split in splits.items() if split == "held_out"),
    )
