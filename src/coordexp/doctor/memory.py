"""Compute the memory of a training step (weights, gradients, moments, activations) without loading a model.

    trained      per parameter 4 bytes of weight, 4 of gradient, 8 of AdamW's moments (2 with 8-bit moments)
    frozen       only the weight, in the format of the device's plan (infra/device.py)
    copies       the bf16 copy that autocast makes of each float32 weight and keeps to the end of the step
    activations  what autograd saves under bf16 autocast, in bytes per token and layer, in the manner of Korthikanti et
                 al. (arXiv:2205.05198, section 4.1); the factors below are exact for transformers' Qwen3-VL with
                 scaled-dot-product attention (a test counts the saved tensors)
    logits       one chunk of the logits of supervised slots, the coordinate logits (values, log-softmax and gradient),
                 and the gradient of the head before it is accumulated
    update       temporaries of the optimizer: none with a fused AdamW, otherwise the square roots of all second
                 moments; with Muon, one stack of matrices

The peak is at the end of a forward pass (copies, activations, logits) or in the update. Not included: fragmentation of
the allocator, workspaces of kernels, and the CUDA context (1 to 2 GB).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from coordexp.config.profile import TuningConfig
from coordexp.geometry.bins import NUM_BINS
from coordexp.infra.device import ComputePlan, training_plan
from coordexp.losses.vocabulary_terms import GPU_CHUNK_SLOTS, LOGIT_BYTES, chunk_slots
from coordexp.models.adapters import PARTS
from coordexp.training.optimizers import STACK_NUMBERS

WEIGHT, GRADIENT, MOMENTS, MOMENTS_8BIT = 4, 4, 8, 2  # bytes per parameter
AUTOCAST_COPY = 2  # bytes of a weight's bf16 copy, kept for the backward pass
LOGIT = 12
ROOTS = 4  # bytes per parameter: roots of the second moments in torch's AdamW without fusion
MUON = 10  # bytes per element of a stack: momentum in float32, and three temporaries in bf16
GPU = training_plan("bf16", torch.device("cuda"))


@dataclass(frozen=True, slots=True)
class Parts:
    """Numbers of parameters by part of the model."""

    vision: int
    projector: int
    language: int

    @property
    def total(self) -> int:
        """The number for the whole model."""
        return self.vision + self.projector + self.language


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one training step on one device, and the number of trained parameters."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    moments: int
    copies: int
    activations: int
    logits: int
    update: int

    @property
    def states(self) -> int:
        """The memory that is held during the whole step."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        """The peak: at the end of the forward pass, or in the update."""
        return self.states + max(self.copies + self.activations + self.logits, self.update)


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
    """Parameters of the adapters on each part if it has them: rank x (inputs + outputs), plus outputs for DoRA."""
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
    """Number of parameters with an optimizer state; it includes the coordinate rows in every mode."""
    return _trained_base(config, tuning) + added_parameters(config, tuning)


def added_parameters(config: Mapping[str, Any], tuning: TuningConfig) -> int:
    """Number of added trained parameters: adapters, and coordinate rows if the rest of a table is frozen."""
    if tuning.method == "full" and tuning.language == "train":
        return 0
    rows = (1 if _is_tied(config) else 2) * NUM_BINS * config["text_config"]["hidden_size"]
    return rows + (0 if tuning.method == "full" else _of_trained_parts(adapters_by_part(config, tuning), tuning))


def _trained_base(config: Mapping[str, Any], tuning: TuningConfig) -> int:
    """Number of the model's own parameters that are trained."""
    return _of_trained_parts(parameters_by_part(config), tuning) if tuning.method == "full" else 0


def _of_trained_parts(parts: Parts, tuning: TuningConfig) -> int:
    return sum(getattr(parts, part) for part in PARTS if getattr(tuning, part) == "train")


def text_layer_bytes(config: Mapping[str, Any]) -> int:
    """Bytes per token that one decoder layer saves for the backward pass."""
    t = config["text_config"]
    heads, keys, dim = t["num_attention_heads"], t["num_key_value_heads"], t["head_dim"]
    return 26 * t["hidden_size"] + 8 * t["intermediate_size"] + (10 * dim + 8) * heads + (10 * dim + 4) * keys + 8


def vision_block_bytes(config: Mapping[str, Any]) -> int:
    """Bytes per patch that one vision block saves for the backward pass."""
    v = config["vision_config"]
    return 22 * v["hidden_size"] + 4 * v["intermediate_size"] + 4 * v["num_heads"] + 16


def step_memory(
    config: Mapping[str, Any],
    tuning: TuningConfig,
    optimizer: str,
    tokens: int,
    image_tokens: int,
    supervised: int,
    plan: ComputePlan = GPU,
) -> Memory:
    """Memory of a forward and backward pass and an update.

    Args:
        config: config.json of the model.
        tuning: trained parts, and whether activations are recomputed.
        optimizer: of the stage; `adamw_8bit` uses one byte per moment.
        tokens: of one forward pass: packs times their length.
        image_tokens: number of visual tokens among them.
        supervised: number of tokens with a loss among them.
        plan: number formats and capabilities of the device; by default those of a GPU.
    """
    total, trained = parameters_by_part(config).total, trained_parameters(config, tuning)
    frozen = total - _trained_base(config, tuning)
    wide = trained + (frozen if plan.frozen == torch.float32 else 0)
    return Memory(
        parameters=total,
        trained=trained,
        weights=WEIGHT * trained + plan.frozen.itemsize * frozen,
        gradients=GRADIENT * trained,
        moments=(MOMENTS_8BIT if optimizer == "adamw_8bit" else MOMENTS) * trained,
        copies=AUTOCAST_COPY * wide if plan.compute != torch.float32 else 0,
        activations=_activation_bytes(config, tuning, tokens, image_tokens),
        logits=_logit_bytes(config, tuning, supervised, plan),
        update=_update_bytes(config, optimizer, trained, plan),
    )


def _activation_bytes(config: Mapping[str, Any], tuning: TuningConfig, tokens: int, image_tokens: int) -> int:
    """A layer saves its activations or, with recomputation, its input; then one layer at a time is recomputed."""
    t, v = config["text_config"], config["vision_config"]
    patches = image_tokens * v["spatial_merge_size"] ** 2
    of_layer = {"language": tokens * text_layer_bytes(config), "vision": patches * vision_block_bytes(config)}
    of_input = {"language": 4 * tokens * t["hidden_size"], "vision": 4 * patches * v["hidden_size"]}
    depth = {"language": t["num_hidden_layers"], "vision": v["depth"] if tuning.vision == "train" else 0}
    again = {"language": tuning.activations == "recompute", "vision": tuning.vision_activations == "recompute"}
    # A frozen vision tower runs without gradients and saves nothing, so its depth counts as 0.
    kept = sum(depth[part] * (of_input if again[part] else of_layer)[part] for part in depth)
    return kept + max((of_layer[part] for part in depth if again[part] and depth[part]), default=0)


def _logit_bytes(config: Mapping[str, Any], tuning: TuningConfig, supervised: int, plan: ComputePlan) -> int:
    """Bytes of one chunk, of the coordinate slots (at most all supervised ones), and of the head's gradient."""
    vocab_size, hidden = config["text_config"]["vocab_size"], config["text_config"]["hidden_size"]
    is_gpu = plan.device.type == "cuda"
    chunk = min(GPU_CHUNK_SLOTS if is_gpu else chunk_slots(vocab_size), supervised) * vocab_size
    trains_all = tuning.method == "full" and tuning.language == "train"
    head = GRADIENT * (vocab_size if trains_all else NUM_BINS) * hidden
    return (LOGIT_BYTES if is_gpu else 4) * chunk + LOGIT * supervised * NUM_BINS + head


def _update_bytes(config: Mapping[str, Any], optimizer: str, trained: int, plan: ComputePlan) -> int:
    if optimizer == "muon":
        t = config["text_config"]
        return MUON * max(STACK_NUMBERS, t["hidden_size"] * t["intermediate_size"])
    return 0 if plan.fuses_optimizer or optimizer == "adamw_8bit" else ROOTS * trained


def outside_layers(config: Mapping[str, Any]) -> int:
    """Number of parameters outside layers and vision blocks: tables, mergers, patch and position embeddings."""
    text, vision = config["text_config"] | {"num_hidden_layers": 0}, config["vision_config"] | {"depth": 0}
    return parameters_by_part({**config, "text_config": text, "vision_config": vision}).total


def sharded_memory(memory: Memory, config: Mapping[str, Any], processes: int) -> Memory:
    """The same step with sharded states: a fraction of them, plus all parameters outside layers (training/sharding.py).

    The layer that is currently gathered is not included: for 8B it has 0.8 GB of weights and 0.8 GB of gradients.
    """
    whole = outside_layers(config)
    return replace(
        memory,
        weights=memory.weights // processes + WEIGHT * whole,
        gradients=memory.gradients // processes + GRADIENT * whole,
        moments=memory.moments // processes,
        copies=0,  # weights are cast at each use
        update=memory.update // processes,
    )


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config["text_config"].get("tie_word_embeddings", False)))
