"""Turn an image file into the flattened patches that Qwen3-VL's vision tower takes.

The arithmetic is that of `Qwen2VLImageProcessorPil` in transformers (a test compares both). The image is resized once,
to the size that norm1000 recorded, and small images are about ten times faster.

Shapes: H, W resized image; p patch size, m merge size, t = 2 temporal patch; P = (H/p)(W/p) patches of 3*t*p*p values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordexp.errors import DataError
from coordexp.records.images import MAX_ASPECT_RATIO, read_record_rgb, read_rgb

# Maps bytes 0..255 to -1..1, as Qwen3-VL's processor does: (value / 255 - mean) / std.
PIXEL_MEAN = PIXEL_STD = 0.5


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """The input format of the vision tower; `factor` is the side of one visual token in pixels."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int

    @property
    def factor(self) -> int:
        """Sides of the resized image are multiples of this (patch x merge)."""
        return self.patch_size * self.merge_size

    def within(self, min_pixels: int, max_pixels: int) -> PixelSpec:
        """The same format with other limits on the image area."""
        return replace(self, min_pixels=min_pixels, max_pixels=max_pixels)

    def tokens(self, width: int, height: int) -> int:
        """Number of visual tokens of a resized image."""
        return (width // self.factor) * (height // self.factor)


def resized_size(width: int, height: int, spec: PixelSpec) -> tuple[int, int]:
    """Qwen's `smart_resize`: nearest multiples of the factor with an area in [min_pixels, max_pixels].

    The aspect ratio is kept up to rounding ("naive dynamic resolution", Qwen2-VL, arXiv:2409.12191, section 2.1). Each
    step rounds as transformers does, including half to even: the visual tokens must be those of pretraining and of
    other engines.

    Returns (width, height). Raises DataError for an aspect ratio above 200, as Qwen3-VL's processor does.
    """
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError(f"image of {width}x{height} px: aspect ratio above 200 is not supported; crop it first.")
    factor = spec.factor
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
    if new_h * new_w > spec.max_pixels:
        # Scale both sides by 1 / beta, then round down, so that the area stays below the maximum.
        beta = math.sqrt(height * width / spec.max_pixels)
        new_h = max(factor, math.floor(height / beta / factor) * factor)
        new_w = max(factor, math.floor(width / beta / factor) * factor)
    elif new_h * new_w < spec.min_pixels:
        beta = math.sqrt(spec.min_pixels / (height * width))
        new_h = math.ceil(height * beta / factor) * factor
        new_w = math.ceil(width * beta / factor) * factor
    return new_w, new_h


def load_rgb(path: Path, width: int, height: int) -> NDArray[np.uint8]:
    """Read an image as upright RGB (H, W, 3) in the given size; raises DataError if it cannot be read."""
    return _resized(read_rgb(path), width, height)


def load_sample_rgb(image_root: Path, name: str, width: int, height: int) -> NDArray[np.uint8]:
    """As `load_rgb`, for the image name of a record: relative to the image root, possibly with a view (crop, flip)."""
    return _resized(read_record_rgb(image_root, name), width, height)


def _resized(rgb: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def patchify(rgb_HW3: NDArray[np.uint8], spec: PixelSpec) -> NDArray[np.float32]:
    """Normalize to [-1, 1] and cut into patches (P, 3*t*p*p), ordered merge block by merge block.

    The tower merges m x m neighboring patches into one visual token, so they must be adjacent in the sequence. Its
    patch embedding is a 3D convolution over t frames; a still image is the same frame t times.
    """
    height, width = rgb_HW3.shape[:2]
    p, m = spec.patch_size, spec.merge_size
    # Rescaling and normalization as one multiplication and one subtraction, as in the processors of transformers.
    pixels = rgb_HW3.astype(np.float32) * (1.0 / (255.0 * PIXEL_STD)) - PIXEL_MEAN / PIXEL_STD
    grid = pixels.reshape(height // (p * m), m, p, width // (p * m), m, p, 3)
    # (block row, row in block, y, block column, column in block, x, channel) -> blocks, channel, y, x
    patches = grid.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, p, p)
    repeated = np.broadcast_to(patches, (len(patches), 3, spec.temporal_patch_size, p, p))
    return repeated.reshape(len(patches), -1)
