"""A training step of a random-weight model of Qwen3-VL's shape on packed sequences of 12,288 tokens, on one GPU.

    PYTHONPATH=src python -m benchmarks.gpu_step [--size 2b] [--peak-tflops 989]

Step time and the share of model FLOPs that it reaches, what vision, language, objective and optimizer take of it, for
attention over segments and what transformers offers without extra packages, and whether packing changes the result.
`--smoke` (as `--quick`) runs the same code on a CPU with a shrunken model: it works, and measures nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from benchmarks.harness import Row, unmeasured
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import Qwen3VLForConditionalGeneration

from benchmarks import harness
from coordexp.config.loading import load_params
from coordexp.geometry.bins import NUM_BINS
from coordexp.models.attention import use_segment_attention
from coordexp.models.expand import round_up
from coordexp.models.forward import hidden_states
from coordexp.models.processor import pixel_spec
from coordexp.models.sizes import DENSE_SIZES, qwen3_vl_config, shrunken_config
from coordexp.packing.collator import Collator, PackedBatch, teacher_segment
from coordexp.packing.samples import Sample
from coordexp.text.codecs import Role
from coordexp.training.step import Counts, Criterion, step_counts, term_sums, weigh

FIRST_COORD = 151_669  # behind Qwen's own tokens
OBJECTS = 7  # of one picture, as in COCO
OBJECT_ROLES = [Role.STRUCT] * 8 + [Role.DESC] * 2 + [Role.STRUCT] * 13 + [Role.COORD] * 4
SEGMENTS = "segments"  # models/attention.py
TOLERANCE = 5e-2  # of hidden states in bf16, relative to their norm


class NoiseCollator(Collator):
    """A collator whose pictures are noise: there are no files."""

    def _load(self, sample: Sample) -> NDArray[np.uint8]:
        rng = np.random.default_rng(sample.image_id)
        return rng.integers(0, 256, (sample.resized_height, sample.resized_width, 3), np.uint8)


@dataclass(frozen=True, slots=True)
class Bench:
    """Model, batch and how to train on it."""

    model: Qwen3VLForConditionalGeneration
    optimizer: Optimizer
    batch: PackedBatch
    alone: list[PackedBatch]
    counts: Counts
    criterion: Criterion

    def hidden(self, batch: PackedBatch | None = None) -> Tensor:
        """The forward up to the head, in the trainer's precision: float32 weights, bf16 products."""
        with torch.autocast(self.model.device.type, torch.bfloat16):
            return hidden_states(self.model, batch or self.batch)

    def loss(self, hidden: Tensor) -> Tensor:
        """The objective of stage 1 on hidden states."""
        sums, _ = term_sums(self.model, self.criterion, self.batch, hidden, hidden, self.counts)
        weighted, _ = weigh(sums, self.criterion.weights, self.counts)
        return torch.stack(list(weighted.values())).sum()

    def update(self) -> None:
        """One optimizer step."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def samples(image_token: int, count: int, side: int, pixels_factor: int) -> list[Sample]:
    """Pictures of one size with COCO's number of objects, and random answers."""
    rng, tokens = np.random.default_rng(3), (side // pixels_factor) ** 2
    roles = np.array([*OBJECT_ROLES * OBJECTS, Role.CLOSE], np.uint8)
    ids = rng.integers(0, 150_000, (count, len(roles)))
    ids = np.where(roles == Role.COORD, FIRST_COORD + rng.integers(0, NUM_BINS, ids.shape), ids).astype(np.int32)
    prompt = np.array([*range(1, 9), image_token, *range(9, 20)], np.int32)
    boxes = np.sort(rng.random((count, OBJECTS, 2, 2)).astype(np.float32) * side, axis=2).reshape(count, OBJECTS, 4)
    owners = np.append(np.repeat(np.arange(OBJECTS), len(OBJECT_ROLES)), -1).astype(np.int16)
    names, crowd = ("thing",) * OBJECTS, (False,) * OBJECTS
    sizes = (side, side, side, side, tokens)
    return [Sample(i, "", *sizes, prompt, ids[i], roles, owners, names, boxes[i], crowd) for i in range(count)]


def build(arguments: argparse.Namespace, attention: str, device: torch.device) -> Bench:
    """The model of the wanted shape with one packed row."""
    config = qwen3_vl_config(arguments.size)
    if arguments.quick:
        config = shrunken_config(config)
    config.text_config.vocab_size = round_up(FIRST_COORD + NUM_BINS)
    torch.manual_seed(17)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(config)
    if attention == SEGMENTS:
        use_segment_attention(model)
    else:
        model.set_attn_implementation(attention)
    side, pack_tokens = (64, 512) if arguments.quick else (576, arguments.tokens)
    pixels = pixel_spec(model.config, side * side, side * side)
    one = samples(config.image_token_id, 1, side, pixels.factor)[0]
    chosen = [
        teacher_segment(s) for s in samples(config.image_token_id, pack_tokens // one.length, side, pixels.factor)
    ]
    collator = NoiseCollator(Path(), pixels, config.image_token_id, 0, pack_tokens)
    return Bench(
        model=model,
        optimizer=AdamW(model.parameters(), lr=1e-5),
        batch=collator(chosen).to(device),
        alone=[collator([s]).to(device) for s in chosen[:3]],
        counts=step_counts(chosen),
        criterion=Criterion.stage1(load_params(Path("params.yaml")), FIRST_COORD, steps=1),
    )


def packed_error(bench: Bench) -> float:
    """Largest relative difference between hidden states in the pack and alone, over the first segments."""
    with torch.no_grad():
        packed, at, worst = bench.hidden(), 0, 0.0
        for one in bench.alone:
            own = bench.hidden(one)
            difference = (packed[at : at + len(own)] - own).float().norm() / own.float().norm()
            worst, at = max(worst, float(difference)), at + len(own)
    return worst


def flops(bench: Bench) -> float:
    """Multiplications and additions of forward and backward: 6 a weight and token, and those of attention."""
    text, vision = bench.model.config.text_config, bench.model.config.vision_config
    embedding = bench.model.get_input_embeddings().weight.numel()
    language = sum(p.numel() for p in bench.model.model.language_model.parameters()) - embedding
    visual = sum(p.numel() for p in bench.model.model.visual.parameters())
    n_patches, n_slots = len(bench.batch.pixel_values), len(bench.batch.text_slots) + len(bench.batch.coord_slots)
    length, patches = bench.batch.n_tokens / bench.batch.n_segments, n_patches / bench.batch.n_segments
    attention = 6 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * length * bench.batch.n_tokens
    attention += 12 * vision.depth * vision.hidden_size * patches * n_patches
    return 6 * (language * bench.batch.n_tokens + visual * n_patches + embedding * n_slots) + attention


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds, with the device idle before and after."""
    found = []
    for _ in range(rounds + 1):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - started)
    return median(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rows_of(bench: Bench, attention: str, arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Time, MFU, shares and exactness under one attention."""
    model, batch = bench.model, bench.batch

    def step() -> None:
        bench.loss(bench.hidden()).backward()
        bench.update()

    def vision() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            features = model.model.get_image_features(batch.pixel_values, batch.image_grid_thw).pooler_output
        torch.cat(list(features)).sum().backward()

    hidden = bench.hidden().detach().requires_grad_()
    rounds, what = 1 if arguments.quick else 5, f"{arguments.size}, {attention}"
    whole = seconds_of(step, device, rounds)
    parts = {
        "vision": seconds_of(vision, device, rounds),
        "objective": seconds_of(lambda: bench.loss(hidden).backward(), device, rounds),
        "optimizer": seconds_of(bench.optimizer.step, device, rounds),
    }
    parts["language"] = whole - sum(parts.values())
    beside = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts.items())
    yield Row(f"GPU step: {what}", whole, "s", f"{beside}; {batch.n_tokens:,} tokens", "", None)
    mfu = flops(bench) / whole / (arguments.peak_tflops * 1e12)
    yield Row(f"GPU step: MFU, {what}", mfu, "", f"{arguments.peak_tflops:g} TFLOP/s", "", None)
    error, limit = packed_error(bench), f"<= {TOLERANCE}"
    yield Row(f"GPU step: packed - alone, {what}", error, "relative", "bf16", limit, error <= TOLERANCE)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        yield Row(f"GPU step: peak memory, {what}", peak, "GiB", "", "", None)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All attentions on the device at hand."""
    arguments.quick = arguments.quick or arguments.smoke
    if not (torch.cuda.is_available() or arguments.quick):
        return [unmeasured("GPU step", "needs CUDA")]
    device = torch.device("cpu" if arguments.quick else "cuda")
    rows: list[Row] = []
    for attention in (SEGMENTS, "sdpa") if arguments.quick else (SEGMENTS, "sdpa", "flex_attention"):
        rows += rows_of(build(arguments, attention, device), attention, arguments, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    """Which model, how long a sequence, and what the device could do at best."""
    parser.add_argument("--size", choices=sorted(DENSE_SIZES), default="2b")
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device, dense bf16  [H100, H200: 989]")
    parser.add_argument("--smoke", action="store_true", help="as --quick")


if __name__ == "__main__":
    harness.script("gpu_step", __doc__, measure, options)
