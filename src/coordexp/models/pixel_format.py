"""The image format of a checkpoint: patch and merge sizes from its config, area limits from the profile."""

from __future__ import annotations

from transformers import Qwen3VLConfig

from coordexp.packing.pixels import PixelSpec


def pixel_spec(config: Qwen3VLConfig, min_pixels: int, max_pixels: int) -> PixelSpec:
    """What `packing.pixels` needs to know to feed this model."""
    vision = config.vision_config
    return PixelSpec(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
