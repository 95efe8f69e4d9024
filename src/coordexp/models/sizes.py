"""The published dense sizes of Qwen3-VL, and a shrunken model of the same family for checks without its weights.

The numbers are from the config.json files of Qwen3-VL-2B, -4B and -8B-Instruct. Tests compare the resulting parameter
counts with the published totals.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from coordexp.models.loading import Checkpoint, read_format, save_checkpoint

VOCABULARY_ROWS = 151_936


@dataclass(frozen=True, slots=True)
class DenseSize:
    """The values that differ between the dense sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tied: bool
    vision_hidden: int
    vision_intermediate: int
    vision_depth: int
    deepstack: tuple[int, ...]


_SMALL_VISION = {"vision_hidden": 1024, "vision_intermediate": 4096, "vision_depth": 24, "deepstack": (5, 11, 17)}
DENSE_SIZES: dict[str, DenseSize] = {
    "2b": DenseSize(2048, 6144, 28, 16, True, **_SMALL_VISION),  # type: ignore[arg-type]
    "4b": DenseSize(2560, 9728, 36, 32, True, **_SMALL_VISION),  # type: ignore[arg-type]
    "8b": DenseSize(4096, 12288, 36, 32, False, 1152, 4304, 27, (8, 16, 24)),
}


def qwen3_vl_config(size: str) -> Qwen3VLConfig:
    """The configuration of Qwen3-VL-<size>-Instruct: "2b", "4b" or "8b"."""
    dense = DENSE_SIZES[size]
    text = {
        "vocab_size": VOCABULARY_ROWS,
        "hidden_size": dense.hidden,
        "intermediate_size": dense.intermediate,
        "num_hidden_layers": dense.layers,
        "num_attention_heads": dense.heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": dense.tied,
    }
    vision = {
        "depth": dense.vision_depth,
        "hidden_size": dense.vision_hidden,
        "intermediate_size": dense.vision_intermediate,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": dense.hidden,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": list(dense.deepstack),
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=dense.tied)


def shrunken_config(config: Qwen3VLConfig, hidden: int = 64, layers: int = 2) -> Qwen3VLConfig:
    """The same architecture and vocabulary with a fraction of width and depth; patches, merging, tying and ids stay."""
    tree = config.to_dict()
    text, vision = tree["text_config"], tree["vision_config"]
    text.pop("layer_types", None)  # has one entry per original layer
    text |= {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    text["rope_parameters"]["mrope_section"] = [6, 5, 5]  # head_dim / 2 frequencies
    vision |= {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "depth": 2}
    vision |= {"out_hidden_size": hidden, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig.from_dict(tree)


def build_shrunken(config: Qwen3VLConfig, seed: int) -> Qwen3VLForConditionalGeneration:
    """A randomly initialized model of `shrunken_config`, in float32."""
    torch.manual_seed(seed)
    return Qwen3VLForConditionalGeneration(shrunken_config(config))


def write_shrunken(folder: Path, out: Path, seed: int) -> int:
    """Write a shrunken model with the config and tokenizer of a checkpoint folder; returns its number of parameters.

    Raises:
        CheckpointError: the folder is not a Qwen3-VL checkpoint; its weights are not read.
    """
    form = read_format(folder)
    model = build_shrunken(Qwen3VLConfig.from_pretrained(folder, local_files_only=True), seed)
    model.generation_config.eos_token_id = form.tokenizer.eos_token_id
    model.generation_config.pad_token_id = form.tokenizer.pad_token_id
    small = Checkpoint(model=model, tokenizer=form.tokenizer, pixels=form.pixels, detection=form.detection)
    save_checkpoint(out, small)
    return sum(parameter.numel() for parameter in model.parameters())
