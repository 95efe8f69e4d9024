"""Training steps of the real loop at Qwen3-VL's shapes: each optimization alone, and a breakdown of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.gpu_check.predictions import PEAK_FLOPS, STEP_TOKENS
from benchmarks.gpu_check.products import product_precision
from benchmarks.gpu_check.run import Check, Moment, moment, peak_bytes, reset_memory, seconds_between
from benchmarks.gpu_check.shapes import (
    FIRST_COORD,
    Pack,
    build,
    config_of,
    criterion,
    pack_of,
    profile_of,
    step_flops,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import Qwen3VLForConditionalGeneration

from coordexp.config.profile import OptimConfig
from coordexp.infra.device import training_plan
from coordexp.models.adapters import apply_tuning
from coordexp.models.attention import TEXT, VISION, PatchProduct, use_segment_attention
from coordexp.text.vocabulary import CoordVocabulary
from coordexp.training import step as training_step
from coordexp.training.loop import Callback, MicroBatch, train
from coordexp.training.step import Criterion, micro_batch

WARM_STEPS, TIMED_STEPS = 2, 5
KERNELS = 20  # that the profile shows
NONE, COMMITTED = "none", "as committed"
ALONE = ("segments", "patches", "bf16 head", "fused optimizer")
KEPT = "vision activations kept"
VARIANTS = {NONE: (), **{f"{cure} alone": (cure,) for cure in ALONE}, COMMITTED: ALONE}


def all_weights(check: Check) -> None:
    """2B, all weights: as transformers and torch do it, each cure alone, as committed; then the kernels of a step."""
    with _Rig(check, "2b") as rig:
        for label, tokens in STEP_TOKENS.items():
            pack = pack_of(rig.model.config, check.pick(tokens, 400), check.small)
            variants = list(VARIANTS) if label == "8k" and not check.small else [NONE, COMMITTED]
            for variant in reversed(variants):  # what is committed first: it matters most
                rig.measure(f"{label}, {variant}", variant, pack)
            if label == "8k":
                rig.profile(pack)
                rig.model.model.visual.gradient_checkpointing_disable()
                rig.measure(f"{label}, {KEPT}", COMMITTED, pack)
                rig.model.model.visual.gradient_checkpointing_enable({"use_reentrant": False})


def adapters(check: Check) -> None:
    """4B and 8B with adapters, as their profiles train them."""
    for size in ("4b", "8b"):
        with check.part(size), _Rig(check, size) as rig:
            pack = pack_of(rig.model.config, check.pick(8192, 400), check.small)
            for variant in (COMMITTED, NONE) if size == "4b" else (COMMITTED,):
                rig.measure(f"{size}, {variant}", variant, pack)


class _Rig:
    """A model under its committed profile, and how its steps are measured."""

    def __init__(self, check: Check, size: str) -> None:
        self._check = check
        self._optim = profile_of(size).stage1
        self.model = build(config_of(size, check.small), check.device)
        self._theirs = self.model.model.visual.patch_embed
        plan = training_plan(self._optim.precision, check.device).adopt()
        tuning, coord = profile_of(size).tuning, CoordVocabulary(FIRST_COORD)
        self._undo = apply_tuning(self.model, tuning, coord, plan.frozen)

    def __enter__(self) -> _Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo = lambda: None  # nobody needs the merged weights
        del self.model

    def measure(self, name: str, variant: str, pack: Pack) -> None:
        """Seconds of a step and of its parts, the fraction of the peak that it reaches, and its memory."""
        check = self._check
        with check.part(name, is_ours=variant == COMMITTED):
            reset_memory(check.device)
            steps = self._steps(VARIANTS[variant], pack, WARM_STEPS + TIMED_STEPS if not check.small else 2)
            timed = steps[WARM_STEPS:] if not check.small else steps[1:]
            whole = median(sum(parts.values()) for parts in timed)
            parts = {part: median(found[part] for found in timed) for part in timed[0]}
            beside = ", ".join(f"{part} {1000 * seconds:.1f}" for part, seconds in parts.items())
            check.add(f"{name}: step", whole, "s", f"ms: {beside}; {pack.batch.n_tokens:,} tokens")
            flops = step_flops(self.model, pack.batch)
            check.add(f"{name}: MFU", flops / whole / PEAK_FLOPS, "of 989 TFLOP/s", f"{flops:.3g} operations")
            check.add(f"{name}: peak", peak_bytes(check.device) / 1e9, "GB", "of tensors, beside doctor/memory.py")
        self.model.zero_grad(set_to_none=True)

    def profile(self, pack: Pack) -> None:
        """The kernels that take most of a committed step, into a file."""
        with self._check.part("kernels"):
            kind = torch.profiler.ProfilerActivity.CPU if self._check.small else torch.profiler.ProfilerActivity.CUDA
            with torch.profiler.profile(activities=[kind]) as profiler:
                self._steps(VARIANTS[COMMITTED], pack, 2)
            key = "self_cpu_time_total" if self._check.small else "self_device_time_total"
            averages = profiler.key_averages()
            path = self._check.out / "kernels.txt"
            path.write_text(averages.table(sort_by=key, row_limit=KERNELS), encoding="utf-8")
            times = sorted((getattr(event, key) for event in averages), reverse=True)
            self._check.add("kernels", sum(times[:KERNELS]) / max(1, sum(times)), "of two steps", f"in {path.name}")

    def _steps(self, cures: tuple[str, ...], pack: Pack, steps: int) -> list[dict[str, float]]:
        """Seconds of each part of each step, under the real loop."""
        self._prepare(cures)
        optim = self._optim.model_copy(update={"steps": steps, "warmup_steps": 0, "log_every": steps})
        with (
            _Marks(self.model, self._check.device) as marks,
            _plain_optimizer("fused optimizer" not in cures),
            _plain_head("bf16 head" not in cures),
        ):
            _train(self.model, _OnePack(self.model, criterion(steps), pack, marks), optim, marks)
        return marks.seconds()

    def _prepare(self, cures: tuple[str, ...]) -> None:
        """Attention and patch embedding of the model; `cures` of the committed ones, otherwise transformers' own."""
        if cures == ALONE:  # whatever use_segment_attention does
            use_segment_attention(self.model)
            return
        dense = {"text_config": "sdpa", "vision_config": "sdpa"}
        self.model.set_attn_implementation(
            {"text_config": TEXT, "vision_config": VISION} if "segments" in cures else dense
        )
        visual = self.model.model.visual
        visual.patch_embed = PatchProduct(self._theirs.proj) if "patches" in cures else self._theirs


def _train(model: nn.Module, task: _OnePack, optim: OptimConfig, marks: _Marks) -> None:
    with TemporaryDirectory() as folder:
        where = Path(folder)
        train(model, task, optim, where, where / "log.jsonl", save_every_seconds=1e9, callback=marks)


class _OnePack:
    """The same packed row in every step."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, criterion: Criterion, pack: Pack, marks: _Marks) -> None:
        self._model, self._criterion, self._pack, self._marks = model, criterion, pack, marks

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Forward of the row; what follows the yield is its backward."""
        self._marks.begin()
        batch = self._pack.batch.to(self._model.device)
        self._marks.end("copy")
        micro = micro_batch(self._model, self._criterion, batch, self._pack.counts)
        self._marks.end("objective")
        yield micro
        self._marks.end("vision and embedding, backward")

    def items(self, step: int) -> dict[str, Any]:
        """Nothing that a message could name."""
        return {}


class _Marks(Callback):
    """Where the device is at the ends of parts; parts of one step follow each other and add up to it."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, device: torch.device) -> None:
        self._device = device
        self._steps: list[list[tuple[str, Moment]]] = []
        visual, language = model.model.visual, model.model.language_model
        self._hooks = [
            visual.register_forward_hook(lambda *_: self.end("vision, forward")),
            language.register_forward_pre_hook(self._before_language, with_kwargs=True),
            language.register_forward_hook(self._after_language),
            register_optimizer_step_pre_hook(lambda *_: self.end("clipping and log")),
            register_optimizer_step_post_hook(lambda *_: self.end("optimizer")),
        ]

    def __enter__(self) -> _Marks:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """A step begins."""
        self._steps.append([("", moment(self._device))])

    def end(self, part: str) -> None:
        """What ran since the last mark was this part."""
        self._steps[-1].append((part, moment(self._device)))

    def _before_language(self, _: nn.Module, __: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        if (embedded := options.get("inputs_embeds")) is not None and embedded.requires_grad:
            embedded.register_hook(lambda _: self.end("language, backward"))

    def _after_language(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.end("language, forward")
        states: Tensor = output.last_hidden_state
        if states.requires_grad:
            states.register_hook(lambda _: self.end("objective"))

    def seconds(self) -> list[dict[str, float]]:
        """Of each part of each step; a part that comes twice is one."""
        found = []
        for marks in self._steps:
            parts: dict[str, float] = {}
            for (_, first), (part, last) in pairwise(marks):
                parts[part] = parts.get(part, 0.0) + seconds_between(first, last)
            found.append(parts)
        return found


@contextmanager
def _plain_head(is_plain: bool) -> Iterator[None]:
    """In here products with the head are taken of float32 factors, and not by TF32."""
    if not is_plain:
        yield
        return
    with product_precision("highest"), patch.object(training_step, "factor_dtype", lambda _: torch.float32):
        yield


@contextmanager
def _plain_optimizer(is_plain: bool) -> Iterator[None]:
    """In here AdamW steps as torch chooses to on its own: by foreach operations, not fused."""

    def unfuse(optimizer: Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                group["fused"] = None

    hook: Callable[[], None] = register_optimizer_step_pre_hook(unfuse).remove if is_plain else lambda: None
    try:
        yield
    finally:
        hook()
