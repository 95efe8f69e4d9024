"""Backgrounds without labeled objects: crops of the photos that ship with scikit-image, and procedural textures.

Only photos, or parts of them, that show no object of the sprite vocabulary are used. Training scenes use the left 70 %
of each photo and val scenes the right 30 %, so no val background occurs in training.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from skimage import data as skimage_data

Pixels = NDArray[np.float32]
TRAIN_FRACTION = 0.7
# Name -> region (x1, y1, x2, y2) without an object of the vocabulary; None means the whole photo.
PHOTO_REGIONS: dict[str, tuple[int, int, int, int] | None] = {
    "astronaut": None,
    "grass": None,
    "gravel": None,
    "brick": None,
    "rocket": (0, 0, 250, 300),
}


@lru_cache(maxsize=2)
def photos(is_val: bool) -> tuple[Image.Image, ...]:
    """The photos of one split."""
    out = []
    for name, region in PHOTO_REGIONS.items():
        image = Image.fromarray(getattr(skimage_data, name)()).convert("RGB")
        image = image.crop(region) if region else image
        cut = int(image.width * TRAIN_FRACTION)
        out.append(image.crop((cut, 0, image.width, image.height) if is_val else (0, 0, cut, image.height)))
    return tuple(out)


def photo_crop(rng: np.random.Generator, width: int, height: int, is_val: bool) -> Pixels:
    """A random crop of a photo, scaled to the scene, with a random tint, a random flip and sometimes blur."""
    material = photos(is_val)
    image = material[rng.integers(len(material))]
    fraction = rng.uniform(0.35, 1.0)
    crop_w, crop_h = max(8, int(image.width * fraction)), max(8, int(image.height * fraction))
    left, top = int(rng.integers(image.width - crop_w + 1)), int(rng.integers(image.height - crop_h + 1))
    crop = image.crop((left, top, left + crop_w, top + crop_h)).resize((width, height), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.5)))
    pixels = np.asarray(crop, dtype=np.float32)
    tint = rng.uniform(0.6, 1.3, 3).astype(np.float32)
    return np.clip((pixels[:, ::-1] if rng.random() < 0.5 else pixels) * tint, 0, 255)


def gradient(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A linear gradient between two colors in a random direction, with faint noise."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = np.cos(angle) * x / width + np.sin(angle) * y / height
    ramp = (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)
    first, second = rng.uniform(20, 235, (2, 3))
    noise = rng.normal(0, rng.uniform(0, 8), (height, width, 1))
    return np.clip(first + ramp[..., None] * (second - first) + noise, 0, 255).astype(np.float32)


def stripes(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Soft stripes or checks of two muted colors."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 40)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period)
    if rng.random() < 0.3:
        wave = wave * np.sin((-np.sin(angle) * x + np.cos(angle) * y) * 2 * np.pi / period)
    first = rng.uniform(40, 215, 3)
    second = np.clip(first + rng.uniform(-60, 60, 3), 0, 255)
    return (first + (wave[..., None] * 0.5 + 0.5) * (second - first)).astype(np.float32)


def make_background(rng: np.random.Generator, width: int, height: int, is_val: bool) -> Pixels:
    """One background (height, width, 3), float 0..255: 60 % photo, 25 % gradient, 15 % stripes."""
    draw = rng.random()
    if draw < 0.6:
        return photo_crop(rng, width, height, is_val)
    return gradient(rng, width, height) if draw < 0.85 else stripes(rng, width, height)


def add_distractors(rng: np.random.Generator, canvas: Pixels, count: int, is_val: bool) -> None:
    """Blend `count` textured ellipses or rectangles into the canvas, in place, as shapes that are not objects."""
    height, width = canvas.shape[:2]
    for _ in range(count):
        w, h = (int(rng.uniform(0.08, 0.35) * side) + 3 for side in (width, height))
        left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
        texture = make_background(rng, w, h, is_val)
        mask = np.full((h, w, 1), rng.uniform(0.5, 1.0), dtype=np.float32)
        if rng.random() < 0.6:
            y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
            mask = mask * (x**2 + y**2 <= 1)[..., None]
        view = canvas[top : top + h, left : left + w]
        view += mask * (texture - view)
