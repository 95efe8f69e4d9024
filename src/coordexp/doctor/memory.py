"""Memory of a training step by arithmetic: weights, gradients, moments and activations, without loading a model.

    trained      4 bytes of weight, 4 of gradient, 8 of AdamW's moments (2 with one-byte moments); frozen: the weight
    activations  what autograd keeps under bf16 autocast, in bytes a token and layer; the factors below are exact for
                 transformers' Qwen3-VL with scaled-dot-product attention (a test counts the saved tensors)
    logits       one chunk of those of the supervised slots, the coordinate logits (values, log-softmax and gradient),
                 and the gradient of the head before it is added; in float32

What it leaves out: the allocator's fragments, the workspace of kernels, and the context of the GPU (1 to 2 GB).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from coordexp.config.profile import TuningConfig
from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.vocabulary_terms import chunk_slots

WEIGHT, GRADIENT, MOMENTS, MOMENTS_8BIT = 4, 4, 8, 2  # bytes of a parameter
AUTOCAST_COPY = 2  # bytes of a weight's bf16 copy, kept for the backward pass
LOGIT = 12


@dataclass(frozen=True, slots=True)
class Parts:
    """Numbers by part of the model."""

    vision: int
    projector: int
    language: int

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.vision + self.projector + self.language


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one training step on one device, and how many parameters train."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it at the end of the forward pass, which is the peak."""
        return self.weights + self.gradients + self.moments + self.activations + self.logits


def parameters_by_part(config: Mapping[str, Any]) -> Parts:
    """Parameters of a Qwen3-VL `config.json`; a tied head counts once."""
    t, v = config["text_config"], config["vision_config"]
    hidden, head_dim = t["hidden_size"], t["head_dim"]
    attention = hidden * head_dim * 2 * (t["num_attention_heads"] + t["num_key_value_heads"]) + 2 * head_dim
    layer = attention + 3 * hidden * t["intermediate_size"] + 2 * hidden
    tables = (1 if _is_tied(config) else 2) * t["vocab_size"] * hidden
    language = tables + t["num_hidden_layers"] * layer + hidden
    width, merged = v["hidden_size"], v["hidden_size"] * v["spatial_merge_size"] ** 2
    patch = 3 * v["temporal_patch_size"] * v["patch_size"] ** 2 * width + width
    block = 4 * width * width + 2 * width * v["intermediate_size"] + v["intermediate_size"] + 9 * width
    vision = patch + v["num_position_embeddings"] * width + v["depth"] * block
    merger = merged * merged + merged + merged * v["out_hidden_size"] + v["out_hidden_size"]
    deep = len(v["deepstack_visual_indexes"])
    projector = (deep + 1) * merger + 2 * width + deep * 2 * merged  # norms before and after merging
    return Parts(vision, projector, language)


def adapters_by_part(config: Mapping[str, Any], tuning: TuningConfig) -> Parts:
    """Parameters of the adapters on each part, if it had some: rank x (inputs + outputs), DoRA also the outputs."""
    t, v = config["text_config"], config["vision_config"]
    hidden, inner, width = t["hidden_size"], t["intermediate_size"], v["hidden_size"]
    queries, keys = (t[name] * t["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    text = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    text += [(hidden, inner), (hidden, inner), (inner, hidden)]
    block = [(width, 3 * width), (width, width), (width, v["intermediate_size"]), (v["intermediate_size"], width)]
    merged = width * v["spatial_merge_size"] ** 2
    merger = [(merged, merged), (merged, v["out_hidden_size"])]

    def size(layers: list[tuple[int, int]], times: int) -> int:
        extra = 1 if tuning.method == "dora" else 0
        return times * sum(tuning.rank * (inputs + outputs) + extra * outputs for inputs, outputs in layers)

    mergers = len(v["deepstack_visual_indexes"]) + 1
    return Parts(size(block, v["depth"]), size(merger, mergers), size(text, t["num_hidden_layers"]))


def trained_parameters(config: Mapping[str, Any], tuning: TuningConfig) -> int:
    """Parameters that get an optimizer state; the coordinate rows do in every mode."""
    trains = [part for part in ("vision", "projector", "language") if getattr(tuning, part) == "train"]
    t = config["text_config"]
    tables = 1 if _is_tied(config) else 2
    if tuning.method == "full":
        parts = parameters_by_part(config)
        # Frozen language still holds gradient and moments of the whole table: only its rows are masked.
        masked = 0 if tuning.language == "train" else tables * t["vocab_size"] * t["hidden_size"]
        return sum(getattr(parts, part) for part in trains) + masked
    adapters = adapters_by_part(config, tuning)
    return sum(getattr(adapters, part) for part in trains) + tables * NUM_BINS * t["hidden_size"]


def text_layer_bytes(config: Mapping[str, Any]) -> int:
    """Bytes that one decoder layer keeps for each token."""
    t = config["text_config"]
    heads, keys, dim = t["num_attention_heads"], t["num_key_value_heads"], t["head_dim"]
    return 26 * t["hidden_size"] + 8 * t["intermediate_size"] + (10 * dim + 8) * heads + (10 * dim + 4) * keys + 8


def vision_block_bytes(config: Mapping[str, Any]) -> int:
    """Bytes that one vision block keeps for each patch."""
    v = config["vision_config"]
    return 22 * v["hidden_size"] + 4 * v["intermediate_size"] + 4 * v["num_heads"] + 16


def step_memory(
    config: Mapping[str, Any],
    tuning: TuningConfig,
    optimizer: str,
    tokens: int,
    image_tokens: int,
    supervised: int,
) -> Memory:
    """Memory of a forward and backward pass.

    Args:
        config: config.json of the model.
        tuning: what trains, and whether activations are recomputed.
        optimizer: of the stage; `adamw_8bit` keeps one byte a moment.
        tokens: of one forward: packs times their length.
        image_tokens: how many of them are visual.
        supervised: how many of them have a loss.
    """
    t, v = config["text_config"], config["vision_config"]
    patches = image_tokens * v["spatial_merge_size"] ** 2
    text, vision = tokens * text_layer_bytes(config), patches * vision_block_bytes(config)
    total, trained = parameters_by_part(config).total, trained_parameters(config, tuning)
    if tuning.activations == "recompute":
        # Every layer keeps its input; one at a time is computed again.
        kept = 4 * (tokens * t["hidden_size"] * t["num_hidden_layers"] + patches * v["hidden_size"] * v["depth"])
        activations = kept + max(text, vision)
    else:
        activations = text * t["num_hidden_layers"] + vision * v["depth"] + AUTOCAST_COPY * total
    base = 0 if tuning.method == "full" else trained  # adapters come beside the weights
    return Memory(
        parameters=total,
        trained=trained,
        weights=WEIGHT * (total + base),
        gradients=GRADIENT * trained,
        moments=(MOMENTS_8BIT if optimizer == "adamw_8bit" else MOMENTS) * trained,
        activations=activations,
        logits=_logit_bytes(config, tuning, supervised),
    )


def _logit_bytes(config: Mapping[str, Any], tuning: TuningConfig, supervised: int) -> int:
    """Of one chunk, of the coordinate slots (all supervised ones are taken for such), and the head's gradient."""
    vocab_size, hidden = config["text_config"]["vocab_size"], config["text_config"]["hidden_size"]
    chunk = min(chunk_slots(vocab_size), supervised) * vocab_size
    trained_rows = vocab_size if tuning.method == "full" else NUM_BINS
    return 4 * chunk + LOGIT * supervised * NUM_BINS + GRADIENT * trained_rows * hidden


def outside_layers(config: Mapping[str, Any]) -> int:
    """Parameters that are in no decoder layer and no vision block: tables, mergers, patch and position embeddings."""
    text, vision = config["text_config"] | {"num_hidden_layers": 0}, config["vision_config"] | {"depth": 0}
    return parameters_by_part({**config, "text_config": text, "vision_config": vision}).total


def sharded_memory(memory: Memory, config: Mapping[str, Any], processes: int) -> Memory:
    """The same step with states sharded: a share of them, and whole what is no layer (training/sharding.py).

    The layer that is gathered at the moment is left out: in 8B it is 0.8 GB of weights and 0.8 GB of gradients.
    """
    whole = outside_layers(config)
    return replace(
        memory,
        weights=memory.weights // processes + WEIGHT * whole,
        gradients=memory.gradients // processes + GRADIENT * whole,
        moments=memory.moments // processes,
    )


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config["text_config"].get("tie_word_embeddings", False)))
