"""The image format of a checkpoint: patch and merge sizes from its config, area limits from the profile."""

from __future__ import annotations

from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from coordexp.errors import CheckpointError
from coordexp.packing.pixels import PixelSpec


def pixel_spec(config: Qwen3VLConfig, min_pixels: int, max_pixels: int) -> PixelSpec:
    """What `packing.pixels` needs to know to feed this model; raises CheckpointError if its patches are not square."""
    vision = config.vision_config
    assert isinstance(vision, Qwen3VLVisionConfig)  # the config builds it from whatever it was given
    patch, temporal = vision.patch_size, vision.temporal_patch_size
    if not isinstance(patch, int) or not isinstance(temporal, int):
        raise CheckpointError(
            f"config.json: vision_config has patch_size {patch!r} and temporal_patch_size {temporal!r}, expected one "
            "whole number each. Only models with square patches can be fed."
        )
    return PixelSpec(
        patch_size=patch,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=temporal,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
