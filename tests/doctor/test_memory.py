"""Computed memory compared with real models: parameters, adapters, and tensors that autograd saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from coordexp.config.profile import TuningConfig
from coordexp.doctor.memory import (
    GPU,
    adapters_by_part,
    outside_layers,
    parameters_by_part,
    sharded_memory,
    step_memory,
    text_layer_bytes,
    trained_parameters,
    vision_block_bytes,
)
from coordexp.infra.device import training_plan
from coordexp.models.adapters import PARTS, apply_tuning, count_trainable, part_of
from coordexp.models.sizes import DENSE_SIZES, build_shrunken, qwen3_vl_config, shrunken_config
from coordexp.text.vocabulary import CoordVocabulary
from helpers import on_meta

CPU = training_plan("bf16", torch.device("cpu"))


def tuning(**changes: Any) -> TuningConfig:
    keys = {"method": "full", "vision": "train", "projector": "train", "language": "train", "rank": 8, "alpha": 16.0}
    return TuningConfig(**(keys | {"dropout": 0.0, "activations": "keep", "vision_activations": "keep"} | changes))


@pytest.mark.parametrize("size", DENSE_SIZES)
def test_parameters_by_part_are_those_of_the_model(size):
    config = qwen3_vl_config(size)
    counted = dict.fromkeys(PARTS, 0)
    for name, parameter in on_meta(config).named_parameters():
        counted[part_of(name)] += parameter.numel()
    parts = parameters_by_part(config.to_dict())
    assert {part: getattr(parts, part) for part in PARTS} == counted


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("size", ["2b", "8b"])  # tied, untied
@pytest.mark.parametrize("frozen", [None, "vision", "language"])
def test_trained_parameters_equal_those_of_peft(size, method, frozen):
    pytest.importorskip("peft")
    how = tuning(method=method, **({frozen: "freeze"} if frozen else {}))
    model = build_shrunken(qwen3_vl_config(size), seed=0)
    apply_tuning(model, how, CoordVocabulary(1000))
    assert count_trainable(model) == trained_parameters(shrunken_config(qwen3_vl_config(size)).to_dict(), how)
    assert adapters_by_part(model.config.to_dict(), how).total > 0


SHAPES = [{}, {"hidden_size": 96, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2}]


def build(layers: int, text: dict[str, int], vision: dict[str, int]) -> Qwen3VLForConditionalGeneration:
    tree = shrunken_config(qwen3_vl_config("2b"), layers=layers).to_dict()
    tree["text_config"] |= {"vocab_size": 512, **text}
    tree["text_config"].pop("layer_types", None)
    tree["vision_config"] |= {"out_hidden_size": tree["text_config"]["hidden_size"], "depth": layers, **vision}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(tree)).train()


def kept_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of all tensors that autograd saves, each storage once, without weights."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def per_unit_and_layer(measure: Callable[[int, int], int], few: int, many: int) -> float:
    """Bytes saved per layer and token: the second difference, in which constant parts cancel."""
    return (measure(4, many) - measure(4, few) - measure(2, many) + measure(2, few)) / (2 * (many - few))


@pytest.mark.parametrize("shape", SHAPES, ids=["narrow", "wide"])
def test_bytes_saved_by_a_decoder_layer(shape):
    def measure(layers: int, tokens: int) -> int:
        model = build(layers, shape, {}).model.language_model
        embeds = torch.randn(1, tokens, model.config.hidden_size, requires_grad=True)
        positions = torch.arange(tokens).expand(4, 1, tokens)
        return kept_bytes(model, lambda: model(inputs_embeds=embeds, position_ids=positions, use_cache=False))

    assert per_unit_and_layer(measure, 256, 512) == text_layer_bytes(build(2, shape, {}).config.to_dict())


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 96, "num_heads": 3, "intermediate_size": 300}])
def test_bytes_saved_by_a_vision_block(shape):
    def measure(layers: int, side: int) -> int:
        model = build(layers, {}, shape).model.visual
        grid, patches = torch.tensor([[1, side, side]]), torch.randn(side * side, 3 * 2 * 16 * 16)
        return kept_bytes(model, lambda: model(patches, grid_thw=grid))

    found = (measure(4, 32) - measure(4, 16) - measure(2, 32) + measure(2, 16)) / (2 * (32 * 32 - 16 * 16))
    assert found == vision_block_bytes(build(2, {}, shape).config.to_dict())


def test_memory_of_the_published_sizes():
    """Full training of 4B needs 16 + 2 (copy) bytes per parameter; adapters need little more than 2-byte weights."""
    config = qwen3_vl_config("4b").to_dict()
    forward = {"tokens": 8192, "image_tokens": 5000, "supervised": 2500}
    full = step_memory(config, tuning(activations="recompute"), "adamw", **forward)
    assert full.states == 16 * 4_437_815_808
    assert full.copies == 2 * 4_437_815_808
    keep = step_memory(config, tuning(), "adamw", **forward)
    lora = step_memory(config, tuning(method="lora", rank=16, activations="recompute"), "adamw", **forward)
    eight = step_memory(config, tuning(activations="recompute"), "adamw_8bit", **forward)
    assert lora.total < eight.total < full.total < keep.total
    assert lora.trained < 0.02 * lora.parameters
    assert lora.weights == 2 * lora.parameters + 4 * lora.trained
    assert lora.copies == 2 * lora.trained
    assert lora.gradients + lora.moments < 0.02 * (full.gradients + full.moments)


def test_only_one_chunk_of_logits_is_counted():
    """In addition to the coordinate logits of the slots, and the gradient of the head's trained rows."""
    config = qwen3_vl_config("4b").to_dict()
    vocab_size = config["text_config"]["vocab_size"]
    forward = {"tokens": 8192, "image_tokens": 5000, "supervised": 2500}
    coordinates = 12 * 2500 * 1000
    for plan, chunk in ((GPU, (4 + 2) * 2048 * vocab_size), (CPU, 4 * 257 * vocab_size)):
        full, lora = (step_memory(config, tuning(method=m), "adamw", **forward, plan=plan) for m in ("full", "lora"))
        assert full.logits == chunk + coordinates + 4 * 2560 * vocab_size
        assert lora.logits == chunk + coordinates + 4 * 2560 * 1000
    config["text_config"]["vocab_size"] = 5000
    small = step_memory(config, tuning(), "adamw", **forward, plan=CPU)
    assert small.logits == 4 * 2500 * 5000 + coordinates + 4 * 2560 * 5000


def test_the_peak_is_in_the_update_without_a_fused_optimizer():
    config = qwen3_vl_config("4b").to_dict()
    forward = {"tokens": 2048, "image_tokens": 1200, "supervised": 800}
    how = tuning(activations="recompute", vision_activations="recompute")
    on_gpu, on_cpu = (step_memory(config, how, "adamw", **forward, plan=plan) for plan in (GPU, CPU))
    assert (on_gpu.update, on_cpu.update) == (0, 4 * on_cpu.trained)
    assert on_cpu.total == on_cpu.states + on_cpu.update > on_cpu.states + on_cpu.copies + on_cpu.activations
    assert step_memory(config, how, "muon", **forward).update < on_cpu.update


def test_each_part_recomputes_or_saves_and_a_frozen_tower_saves_nothing():
    config = qwen3_vl_config("4b").to_dict()

    def kept(**changes: str) -> int:
        return step_memory(config, tuning(**changes), "adamw", 8192, 5000, 2500).activations

    both = kept()
    text, vision = both - kept(activations="recompute"), both - kept(vision_activations="recompute")
    assert text > vision > 0
    assert both - kept(vision="freeze") == 24 * 20_000 * vision_block_bytes(config)
    assert kept(activations="recompute", vision_activations="recompute") < both - max(text, vision)


@pytest.mark.parametrize("changes", [{}, {"vision": "freeze"}, {"language": "freeze"}, {"method": "lora"}])
def test_weights_are_those_of_a_tuned_model(changes):
    if "method" in changes:
        pytest.importorskip("peft")
    model, how = build_shrunken(qwen3_vl_config("2b"), seed=0), tuning(**changes)
    apply_tuning(model, how, CoordVocabulary(1000), GPU.frozen)
    memory = step_memory(shrunken_config(qwen3_vl_config("2b")).to_dict(), how, "adamw", 64, 16, 32)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", ["2b", "8b"])  # tied, untied
def test_sharding_leaves_only_parameters_outside_layers_whole(size):
    config = qwen3_vl_config(size)
    names = on_meta(config).named_parameters()
    counted = sum(p.numel() for name, p in names if ".layers." not in name and ".blocks." not in name)
    assert outside_layers(config.to_dict()) == counted
    whole = step_memory(config.to_dict(), tuning(), "adamw", tokens=8192, image_tokens=5000, supervised=2500)
    spread = sharded_memory(whole, config.to_dict(), 8)
    assert spread.moments == whole.moments // 8
    assert spread.weights == whole.weights // 8 + 4 * counted
    assert spread.activations == whole.activations
