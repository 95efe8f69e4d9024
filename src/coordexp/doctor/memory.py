"""Memory of a training step by arithmetic: weights, gradients, moments and activations, without loading a model.

    trained      4 bytes of weight, 4 of gradient, 8 of AdamW's moments (2 with one-byte moments)
    frozen       the weight alone, in the format that the plan of the device holds it in (infra/device.py)
    copies       the bf16 copy that autocast makes of each float32 weight and keeps to the end of the step
    activations  what autograd keeps under bf16 autocast, in bytes a token and layer; the factors below are exact for
                 transformers' Qwen3-VL with scaled-dot-product attention (a test counts the saved tensors)
    logits       one chunk of those of the supervised slots, the coordinate logits (values, log-softmax and gradient),
                 and the gradient of the head before it is added
    update       temporaries of the optimizer: none of a fused AdamW, else the root of all second moments; of Muon one
                 stack of matrices

The step peaks at the end of a forward pass (copies, activations, logits) or in the update. What this leaves out: the
allocator's fragments, the workspace of kernels, and the context of the GPU (1 to 2 GB).
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

WEIGHT, GRADIENT, MOMENTS, MOMENTS_8BIT = 4, 4, 8, 2  # bytes of a parameter
AUTOCAST_COPY = 2  # bytes of a weight's bf16 copy, kept for the backward pass
LOGIT = 12
ROOTS = 4  # of the second moments, in torch's AdamW that is not fused
MUON = 10  # bytes of a number of a stack: momentum added in float32, and three of its size in bf16
GPU = training_plan("bf16", torch.device("cuda"))


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
    copies: int
    activations: int
    logits: int
    update: int

    @property
    def states(self) -> int:
        """What is held through the whole step."""
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
    return _trained_base(config, tuning) + added_parameters(config, tuning)


def added_parameters(config: Mapping[str, Any], tuning: TuningConfig) -> int:
    """Parameters that train beside frozen ones: adapters, and coordinate rows where the rest of a table is frozen."""
    if tuning.method == "full" and tuning.language == "train":
        return 0
    rows = (1 if _is_tied(config) else 2) * NUM_BINS * config["text_config"]["hidden_size"]
    return rows + (0 if tuning.method == "full" else _of_trained_parts(adapters_by_part(config, tuning), tuning))


def _trained_base(config: Mapping[str, Any], tuning: TuningConfig) -> int:
    """The model's own parameters that train."""
    return _of_trained_parts(parameters_by_part(config), tuning) if tuning.method == "full" else 0


def _of_trained_parts(parts: Parts, tuning: TuningConfig) -> int:
    return sum(getattr(parts, part) for part in PARTS if getattr(tuning, part) == "train")


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
    plan: ComputePlan = GPU,
) -> Memory:
    """Memory of a forward and backward pass and an update.

    Args:
        config: config.json of the model.
        tuning: what trains, and whether activations are recomputed.
        optimizer: of the stage; `adamw_8bit` keeps one byte a moment.
        tokens: of one forward: packs times their length.
        image_tokens: how many of them are visual.
        supervised: how many of them have a loss.
        plan: number formats, and what the device can do; by default those of a GPU.
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
    """A layer keeps what its backward pass needs, or its input; of the latter, one at a time is computed again."""
    t, v = config["text_config"], config["vision_config"]
    patches = image_tokens * v["spatial_merge_size"] ** 2
    of_layer = {"language": tokens * text_layer_bytes(config), "vision": patches * vision_block_bytes(config)}
    of_input = {"language": 4 * tokens * t["hidden_size"], "vision": 4 * patches * v["hidden_size"]}
    depth = {"language": t["num_hidden_layers"], "vision": v["depth"] if tuning.vision == "train" else 0}
    again = {"language": tuning.activations == "recompute", "vision": tuning.vision_activations == "recompute"}
    kept = sum(depth[part] * (of_input if again[part] else of_layer)[part] for part in depth)
    return kept + max((of_layer[part] for part in depth if again[part] and depth[part]), default=0)


def _logit_bytes(config: Mapping[str, Any], tuning: TuningConfig, supervised: int, plan: ComputePlan) -> int:
    """Of one chunk, of the coordinate slots (all supervised ones are taken for such), and the head's gradient."""
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
        copies=0,  # weights are cast at each use
        update=memory.update // processes,
    )


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config["text_config"].get("tie_word_embeddings", False)))
