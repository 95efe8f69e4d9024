"""The image format of a checkpoint: patch and merge sizes from its config, area limits from its processor files.

These are the files of transformers, so that `AutoProcessor` and vLLM use the same pixels as training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as repr_of
from typing import Any, TypeGuard

from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from coordexp.errors import CheckpointError
from coordexp.infra.provenance import write_json
from coordexp.models.folder import CHECKPOINT
from coordexp.packing.pixels import PIXEL_MEAN, PIXEL_STD, PixelSpec

IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # newer versions of transformers write all settings here, in blocks
PROCESSOR_FILES = frozenset({IMAGE_FILE, VIDEO_FILE, PROCESSOR_FILE})


def pixel_spec(config: Qwen3VLConfig, min_pixels: int, max_pixels: int) -> PixelSpec:
    """The input format of a model for `packing.pixels`; raises CheckpointError if its patches are not square."""
    vision = config.vision_config
    assert isinstance(vision, Qwen3VLVisionConfig)  # Qwen3VLConfig always converts it to this type
    patch, temporal = vision.patch_size, vision.temporal_patch_size
    if not isinstance(patch, int) or not isinstance(temporal, int):
        raise CheckpointError(
            f"config.json: vision_config has patch_size {patch!r} and temporal_patch_size {temporal!r}, expected one "
            "integer each. Only models with square patches are supported."
        )
    return PixelSpec(
        patch_size=patch,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=temporal,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )


def write_processor_files(folder: Path, pixels: PixelSpec) -> None:
    """Write the image format into a new checkpoint folder."""
    common = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": pixels.patch_size,
        "merge_size": pixels.merge_size,
        "temporal_patch_size": pixels.temporal_patch_size,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
        "size": {"shortest_edge": pixels.min_pixels, "longest_edge": pixels.max_pixels},  # areas, despite the names
    }
    write_json(folder / IMAGE_FILE, {"image_processor_type": "Qwen2VLImageProcessor"} | common)
    write_json(folder / VIDEO_FILE, {"video_processor_type": "Qwen3VLVideoProcessor"} | common)


def read_pixel_spec(folder: Path, config: Qwen3VLConfig) -> PixelSpec:
    """The image format in the processor files of a checkpoint.

    Raises:
        CheckpointError: the files are missing, `packing.pixels` does not support them, or they contradict config.json.
    """
    path, block = _image_block(folder)
    size = block.get("size")
    limits = size if isinstance(size, dict) else {}
    low = limits.get("shortest_edge", block.get("min_pixels"))
    high = limits.get("longest_edge", block.get("max_pixels"))
    if not (_is_count(low) and _is_count(high)) or low > high:
        raise CheckpointError(
            f"{path}: minimum and maximum image area are {repr_of(low)} and {repr_of(high)} pixels "
            f"(size.shortest_edge, size.longest_edge), expected integers with 1 <= minimum <= maximum. {_REMEDY}"
        )
    spec = pixel_spec(config, low, high)
    expected = {
        "patch_size": spec.patch_size,
        "merge_size": spec.merge_size,
        "temporal_patch_size": spec.temporal_patch_size,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
    }
    for key, value in expected.items():
        if block.get(key, value) != value:
            raise CheckpointError(
                f"{path}: {key} is {repr_of(block[key])}, expected {value!r}, as in its config.json. {_REMEDY}"
            )
    return spec


_REMEDY = "Take the processor files from the folder that the weights come from."


def _image_block(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    for name in (IMAGE_FILE, PROCESSOR_FILE):
        path = folder / name
        if not path.exists():
            continue
        content = CHECKPOINT.read_object(path)
        block = content.get("image_processor", content)
        if not isinstance(block, dict):
            raise CheckpointError(f"{path}: the image processor settings are not a JSON object. {_REMEDY}")
        if name == IMAGE_FILE or "image_processor" in content:
            return path, block
    raise CheckpointError(f"{folder}: no {IMAGE_FILE}, which sets the image size of the model. {_REMEDY}")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
