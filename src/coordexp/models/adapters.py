"""Select the trained parameters of a model (all, some parts, or low-rank adapters), and undo it to plain weights.

    undo = apply_tuning(model, profile.tuning, coord)   # freezes, wraps
    ...train...
    undo()                                              # merges: the model is a plain checkpoint again

Adapters are those of PEFT (LoRA: Hu et al., arXiv:2106.09685, eq. 3; DoRA: Liu et al., arXiv:2402.09353), injected in
place, so that references to the model stay valid. The 1000 coordinate embedding rows are trained in every mode, as
full rows (models/coordinate_rows.py): new tokens start from scratch, and a low-rank update of the whole table is not
enough for them. A served adapter cannot carry embedding rows, so stages always write merged weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration

from coordexp.config.profile import TuningConfig
from coordexp.errors import ConfigError
from coordexp.models.coordinate_rows import put_rows_back, train_rows_alone
from coordexp.text.vocabulary import CoordVocabulary

PARTS = ("vision", "projector", "language")
# Full names of the linear layers that get adapters, by part.
ADAPTED = {
    "vision": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
    "projector": r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
    "language": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
}
EMBEDDING, HEAD = "embed_tokens", "lm_head"


def part_of(parameter: str) -> str:
    """The part of a parameter, from its name: vision, projector or language (which includes embedding and head)."""
    if re.match(r"model\.visual\.(merger|deepstack_merger_list)\.", parameter):
        return "projector"
    return "vision" if parameter.startswith("model.visual.") else "language"


def apply_tuning(
    model: Qwen3VLForConditionalGeneration,
    tuning: TuningConfig,
    coord: CoordVocabulary,
    frozen_dtype: torch.dtype = torch.float32,
) -> Callable[[], None]:
    """Freeze and wrap the model in place; returns a function that merges the adapters and unfreezes all parameters.

    Until then, frozen weights are stored in `frozen_dtype`.

    Raises:
        ConfigError: the tuning method needs PEFT, which is not installed.
    """
    merge = _freeze(model, tuning) if tuning.method == "full" else _inject(model, tuning)
    # The coordinate rows need a separate parameter if the table around them is frozen: always with adapters, and in
    # full training if the language part is frozen.
    recomputed = _recompute(model, tuning)
    has_own_rows = tuning.method != "full" or tuning.language == "freeze"
    if has_own_rows:
        train_rows_alone(model, coord)
    restore = _hold_frozen(model, frozen_dtype)

    def undo() -> None:
        restore()
        if has_own_rows:
            put_rows_back(model)
        merge()
        for part in recomputed:
            part.gradient_checkpointing_disable()
        model.requires_grad_(True)

    return undo


def _recompute(model: Qwen3VLForConditionalGeneration, tuning: TuningConfig) -> list[PreTrainedModel]:
    """Enable activation recomputation (Chen et al., arXiv:1604.06174) in the configured parts; returns these parts."""
    wanted = {"vision": tuning.vision_activations, "language": tuning.activations}
    parts = {"vision": model.model.visual, "language": model.model.language_model}
    recomputed = [parts[name] for name, how in wanted.items() if how == "recompute"]
    for part in recomputed:
        part.gradient_checkpointing_enable({"use_reentrant": False})
    return recomputed


def _freeze(model: Qwen3VLForConditionalGeneration, tuning: TuningConfig) -> Callable[[], None]:
    frozen = {part for part in PARTS if getattr(tuning, part) == "freeze"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)
    return lambda: None


def _hold_frozen(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Cast frozen weights to `dtype`; returns a function that restores them, from copies if they were rounded."""
    rounded: list[tuple[nn.Parameter, Tensor]] = []
    changed = [p for p in model.parameters() if not p.requires_grad and p.dtype != dtype]
    for parameter in changed:
        before, parameter.data = parameter.data, parameter.data.to(dtype)
        # A pretrained model comes in bfloat16: the cast is exact then, and no copy is needed.
        if not torch.equal(parameter.data.to(before.dtype), before):
            rounded.append((parameter, before.cpu()))

    def restore() -> None:
        for parameter in changed:
            parameter.data = parameter.data.float()
        for parameter, before in rounded:
            parameter.data = before.to(parameter.device)

    return restore


def _inject(model: Qwen3VLForConditionalGeneration, tuning: TuningConfig) -> Callable[[], None]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(
            f"tuning.method is {tuning.method!r}, which needs PEFT: pip install --no-deps peft (or set method: full)."
        ) from error
    patterns = [ADAPTED[part] for part in PARTS if getattr(tuning, part) == "train"]
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]  # any number scales
        lora_dropout=tuning.dropout,
        use_dora=tuning.method == "dora",
        target_modules="|".join(f"({pattern})" for pattern in patterns),
    )
    wrapped = get_peft_model(model, config)

    def merge() -> None:
        # W = W0 + (alpha / r) B A; safe_merge raises if the sum is not finite.
        wrapped.merge_and_unload(safe_merge=True)
        model.tie_weights()

    return merge


def merged_weights(model: Qwen3VLForConditionalGeneration) -> dict[str, Tensor] | None:
    """The merged weights of a model in training, on the CPU, without changing it; None if it has no adapters."""
    if not any(map(_is_wrapper, model.modules())):
        return None
    on_cpu = {id(t): _cpu_copy(t) for t in (*model.parameters(), *model.buffers())}
    with torch.no_grad():
        # deepcopy with a memo of CPU copies: every tensor counts as copied, so none is duplicated on the device.
        merged = copy.deepcopy(model, on_cpu)
        _merge_in_place(merged)
        merged.tie_weights()
    return merged.state_dict()


def _cpu_copy(tensor: Tensor) -> Tensor:
    clone = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(clone, requires_grad=False) if isinstance(tensor, nn.Parameter) else clone


def _merge_in_place(model: nn.Module) -> None:
    """The equivalent of PEFT's `merge_and_unload` for a model without PEFT's outer wrapper."""
    for parent in [module for module in model.modules() if not _is_wrapper(module)]:
        for name, child in list(parent.named_children()):
            if _is_wrapper(child):
                setattr(parent, name, _merged(child))


def _merged(wrapper: Any) -> nn.Module:
    """The plain layer inside a PEFT layer, with its adapter merged."""
    if hasattr(wrapper, "unload_and_optionally_merge_module"):  # PEFT's auxiliary wrappers
        return wrapper.unload_and_optionally_merge_module(True, True, None)
    wrapper.merge(safe_merge=True)
    return wrapper.get_base_layer()


def _is_wrapper(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") or hasattr(module, "unload_and_optionally_merge_module")


def count_trainable(model: nn.Module) -> int:
    """Number of trained parameters; a tied table counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
