"""Models of Qwen3-VL's shapes with random weights, made on the device, and packs of COCO's mixture for them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from coordexp.config.loading import load_params, load_profile
from coordexp.config.profile import Profile
from coordexp.geometry.bins import NUM_BINS
from coordexp.models.expand import round_up
from coordexp.models.processor import pixel_spec
from coordexp.models.sizes import qwen3_vl_config, shrunken_config
from coordexp.packing.collator import Collator, PackedBatch, Segment, teacher_segment
from coordexp.packing.pixels import PixelSpec
from coordexp.packing.samples import Sample
from coordexp.text.codecs import Role
from coordexp.training.step import Counts, Criterion, step_counts

FIRST_COORD = 151_669  # behind Qwen's own tokens
OBJECTS = 7  # of one picture, as in COCO
OBJECT_ROLES = [Role.STRUCT] * 8 + [Role.DESC] * 2 + [Role.STRUCT] * 13 + [Role.COORD] * 4
WIDTH, HEIGHT = 640, 480  # of a picture: 300 visual tokens
SMALL_SIDE = 64


class NoiseCollator(Collator):
    """A collator whose pictures are noise: there are no files."""

    def _load(self, sample: Sample) -> NDArray[np.uint8]:
        rng = np.random.default_rng(sample.image_id)
        return rng.integers(0, 256, (sample.resized_height, sample.resized_width, 3), np.uint8)


@dataclass(frozen=True, slots=True)
class Pack:
    """One packed row, its segments, and the counts of the step that it is."""

    batch: PackedBatch
    segments: list[Segment]
    counts: Counts


def profile_of(size: str) -> Profile:
    """The committed profile of a size: how it is tuned, by which optimizer."""
    return load_profile(Path(f"configs/coco-qwen3vl-{size}.yaml"))


def config_of(size: str, small: bool) -> Qwen3VLConfig:
    """The configuration with rows for the coordinate tokens; a small one keeps vocabulary and family."""
    config = qwen3_vl_config(size)
    if small:
        config = shrunken_config(config)
    config.text_config.vocab_size = round_up(FIRST_COORD + NUM_BINS)
    return config


def build(
    config: Qwen3VLConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> Qwen3VLForConditionalGeneration:
    """A random model, made where it computes; its attention and patch embedding are transformers' own."""
    torch.manual_seed(17)
    with torch.device(device):
        model: Qwen3VLForConditionalGeneration = Qwen3VLForConditionalGeneration._from_config(
            deepcopy(config),
            dtype=dtype,  # it keeps the configuration, and changes it
        )
    return model


def samples(image_token: int, count: int, width: int, height: int, factor: int, objects: int = OBJECTS) -> list[Sample]:
    """Pictures of one size with COCO's number of objects, and random answers."""
    rng, tokens = np.random.default_rng(3), (width // factor) * (height // factor)
    roles = np.array([*OBJECT_ROLES * objects, Role.CLOSE], np.uint8)
    ids = rng.integers(0, 150_000, (count, len(roles)))
    ids = np.where(roles == Role.COORD, FIRST_COORD + rng.integers(0, NUM_BINS, ids.shape), ids).astype(np.int32)
    prompt = np.array([*range(1, 6), image_token, *range(6, 12)], np.int32)
    corners = np.sort(rng.random((count, objects, 2, 2)).astype(np.float32), axis=2).reshape(count, objects, 4)
    boxes = corners * np.array([width, height, width, height], np.float32)
    owners = np.append(np.repeat(np.arange(objects), len(OBJECT_ROLES)), -1).astype(np.int16)
    names, crowd, sizes = ("thing",) * objects, (False,) * objects, (width, height, width, height, tokens)
    return [Sample(i, "", *sizes, prompt, ids[i], roles, owners, names, boxes[i], crowd) for i in range(count)]


def pack_of(config: Qwen3VLConfig, tokens: int, small: bool) -> Pack:
    """As many pictures with answers as go into one row of so many tokens; on the CPU, as a step gets it."""
    width, height = (SMALL_SIDE, SMALL_SIDE) if small else (WIDTH, HEIGHT)
    pixels = pixel_spec(config, width * height, width * height)
    one = samples(config.image_token_id, 1, width, height, pixels.factor)[0]
    chosen = samples(config.image_token_id, max(1, tokens // one.length), width, height, pixels.factor)
    segments = [teacher_segment(sample) for sample in chosen]
    return Pack(collator(config, pixels, tokens)(segments), segments, step_counts(segments))


def collator(config: Qwen3VLConfig, pixels: PixelSpec, pack_tokens: int) -> NoiseCollator:
    """What lays out such samples."""
    return NoiseCollator(Path(), pixels, config.image_token_id, 0, pack_tokens)


def criterion(steps: int) -> Criterion:
    """The committed objective of stage 1."""
    return Criterion.stage1(load_params(Path("params.yaml")), FIRST_COORD, steps)


def step_flops(model: Qwen3VLForConditionalGeneration, batch: PackedBatch) -> float:
    """Operations of a forward and a backward: 6 a weight and token, and those of attention; nothing computed twice.

    The mergers see a quarter of the patches, the head the supervised slots alone.
    """
    text, vision = model.config.text_config, model.config.vision_config
    named = [(name, parameter.numel()) for name, parameter in model.named_parameters() if ".lora_" not in name]

    def numbers(*parts: str) -> int:
        return sum(n for name, n in named if any(part in name for part in parts))

    n_patches, n_slots = len(batch.pixel_values), len(batch.text_slots) + len(batch.coord_slots)
    merged = n_patches / vision.spatial_merge_size**2
    weights = numbers("language_model.layers.") * batch.n_tokens + numbers("visual.blocks.", "patch_embed") * n_patches
    weights += numbers("merger") * merged + text.vocab_size * text.hidden_size * n_slots
    attention = (
        6
        * text.num_hidden_layers
        * text.num_attention_heads
        * text.head_dim
        * sum(length**2 for length in batch.segments)
    )
    attention += 12 * vision.depth * vision.hidden_size * sum(n**2 for n in batch.pictures)
    return 6.0 * weights + attention
