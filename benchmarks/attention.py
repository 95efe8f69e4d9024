"""A training step of the `tiny` profile with attention over segments, compared with transformers' dense mask.

    PYTHONPATH=src python -m benchmarks.attention --profile tiny [--train-steps 120 --seeds 3]

mask      transformers: SDPA with a T x T mask over packed rows, one call per image, patches by Conv3d
segments  as the stages train: models/attention.py

Time is the CPU time of one thread for forward, backward and Muon, alternating in one process; `mask` uses torch's Muon,
one matrix at a time. Both start from the same weights and use the same batches. In bf16 the gradients of `segments` are
noisier. `--train-steps` measures the effect on training: both train for this many steps on the same data, once per
seed, and are evaluated by the objective on dev in float32 (about 0.6 s per step on two cores).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import numpy as np
import torch
from benchmarks.harness import Row, measured, side_by_side
from benchmarks.tiny_run import TinyRun
from torch import Tensor
from torch.optim import Muon, Optimizer
from transformers import Qwen3VLForConditionalGeneration

from benchmarks import harness, tiny_run
from coordexp.models.loading import Checkpoint
from coordexp.packing.collator import Collator, PackedBatch, teacher_segment
from coordexp.packing.planner import read_packs
from coordexp.packing.samples import SampleSource, SampleStore
from coordexp.stage import LOG, tune_allocator
from coordexp.training.builders import first_coord_id, make_encoder
from coordexp.training.loop import train
from coordexp.training.optimizers import MuonWithAdamW, build_optimizer
from coordexp.training.step import Counts, Criterion, TeacherTask, micro_batch, step_counts

SPEED = 1.45
EXACT, NOISE = 4e-5, 2.0
NO_MOVE = 1e-9  # learning rate while timing: all rounds of both see the same weights
WAYS = ("mask", "segments")
Batch = tuple[PackedBatch, Counts]


class Bench:
    """What both ways share: the run, its initial checkpoint, and the order of data by seed."""

    def __init__(self, run: TinyRun) -> None:
        self.run = run
        self.init = run.paths.norm1000 / "init"
        self.checkpoint = run.checkpoint(self.init)
        self.collator: Collator = self.checkpoint.collator(run.paths.raw, run.profile.packing.pack_tokens)
        self.source = SampleSource(
            SampleStore(run.paths.norm1000 / "train.parquet"),
            make_encoder(self.checkpoint),
            run.params.text.object_order,
            seed=0,
        )
        self.packs = read_packs(run.paths.packed / "plan.parquet")

    def fresh(self, way: str) -> Checkpoint:
        """The initial checkpoint under one way of attention."""
        load = self.run.checkpoint if way == "segments" else self.run.plain_checkpoint
        return load(self.init)

    def task(self, checkpoint: Checkpoint, steps: int, seed: int) -> TeacherTask:
        """Stage 1 on `steps` steps, in the order of a seed."""
        size = self.run.profile.stage1.packs_per_step
        order = np.random.default_rng(seed).permutation(len(self.packs))[: steps * size]
        by_step = [[self.packs[i] for i in chosen] for chosen in np.array_split(order, steps)]
        return TeacherTask(checkpoint.model, self.criterion(steps), self.source, self.collator, by_step)

    def criterion(self, steps: int) -> Criterion:
        """The objective of stage 1."""
        return Criterion.stage1(self.run.params, first_coord_id(self.checkpoint), steps)

    def batch(self, split: str, count: int) -> Batch:
        """The first samples of a split in one packed batch."""
        segments = [teacher_segment(sample) for sample in self.run.samples(split, count)]
        return self.collator(segments), step_counts(segments)


def backward(bench: Bench, model: Qwen3VLForConditionalGeneration, batch: Batch, bf16: bool) -> float:
    """Forward and backward of one batch; returns the loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = micro_batch(model, bench.criterion(1), *batch).loss
        loss.backward()
    return float(loss.detach())


def optimizer_of(bench: Bench, way: str, model: Qwen3VLForConditionalGeneration) -> Optimizer:
    """Stage 1's optimizer; `mask` has torch's Muon, as it had when rows were masked."""
    optim = bench.run.profile.stage1.model_copy(update={"optimizer": "muon", "lr": NO_MOVE})
    optimizer = build_optimizer(model, optim)
    assert isinstance(optimizer, MuonWithAdamW)
    muon, adamw = optimizer.parts
    if way == "mask":
        optimizer = MuonWithAdamW(Muon(muon.param_groups, adjust_lr_fn="match_rms_adamw"), adamw)
    return optimizer


def gradient(bench: Bench, model: Qwen3VLForConditionalGeneration, batch: Batch, bf16: bool) -> Tensor:
    """The gradient of one batch, all parameters in one line."""
    model.zero_grad(set_to_none=True)
    backward(bench, model, batch, bf16)
    found = torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def equality(bench: Bench, models: dict[str, Qwen3VLForConditionalGeneration], batch: Batch) -> Iterator[Row]:
    """How far gradients are from those of the mask in float32, of whose norm they are fractions."""
    exact = gradient(bench, models["mask"], batch, bf16=False)

    def away(way: str, bf16: bool) -> float:
        return float((gradient(bench, models[way], batch, bf16) - exact).norm() / exact.norm())

    single, noise = away("segments", False), {way: away(way, True) for way in WAYS}
    yield measured("attention: gradient - masked one", single, "of its norm", "float32", at_most=EXACT)
    ratio, beside = noise["segments"] / noise["mask"], f"{noise['segments']:.2g} and {noise['mask']:.2g} of its norm"
    yield measured("attention: noise of bf16 gradients", ratio, "x", beside, at_most=NOISE)


def speed(bench: Bench, models: dict[str, Qwen3VLForConditionalGeneration], batch: Batch, rounds: int) -> Iterator[Row]:
    """CPU time of a step of one thread."""

    def step(way: str) -> Callable[[], None]:
        optimizer = optimizer_of(bench, way, models[way])

        def run() -> None:
            backward(bench, models[way], batch, bf16=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    times = side_by_side({way: step(way) for way in WAYS}, rounds)
    beside = f"{times.of('segments').by_cpu.value:.3f} CPU s of one thread, {batch[0].n_segments} samples"
    ratio = times.ratio("mask", "segments").by_cpu
    yield measured("attention: step, times less CPU than masked", ratio, "x", beside, at_least=SPEED)


def trained_loss(bench: Bench, way: str, steps: int, seed: int, dev: Batch) -> float:
    """The objective on dev, in float32, after training one way."""
    checkpoint = bench.fresh(way)
    optim = bench.run.profile.stage1.model_copy(
        update={"steps": steps, "warmup_steps": min(bench.run.profile.stage1.warmup_steps, steps - 1)}
    )
    with TemporaryDirectory() as folder:
        task = bench.task(checkpoint, steps, seed)
        train(checkpoint.model, task, optim, Path(folder), Path(folder) / "log.jsonl", save_every_seconds=1e9)
    checkpoint.model.eval()
    with torch.no_grad():
        return float(micro_batch(checkpoint.model, bench.criterion(steps), *dev).loss)


def training(bench: Bench, steps: int, seeds: int) -> Iterator[Row]:
    """Whether the objective after training differs by the way, beside how it differs by the seed."""
    dev = bench.batch("dev", 200)
    losses = {way: [trained_loss(bench, way, steps, seed, dev) for seed in range(seeds)] for way in WAYS}
    changes = [ours - theirs for ours, theirs in zip(losses["segments"], losses["mask"], strict=True)]
    spread, change = stdev(losses["mask"]), fmean(changes)
    beside = f"{fmean(losses['segments']):.4f} and {fmean(losses['mask']):.4f}; by seed " + ", ".join(
        f"{c:+.4f}" for c in changes
    )
    name = f"attention: dev objective after {steps} steps, segments - mask"
    yield Row(name, change, "nats", beside, f"within {spread:.4f}, sd of {seeds} seeds", abs(change) <= spread)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Equality, time, and training if asked for."""
    run = tiny_run.open_run(arguments)
    folders = (run.paths.norm1000 / "init", run.paths.packed, run.paths.raw)
    if missing := tiny_run.absent("attention", arguments, *folders):
        return missing
    tune_allocator(LOG)
    bench, threads = Bench(run), torch.get_num_threads()
    models = {way: bench.fresh(way).model.train() for way in WAYS}
    batch = bench.batch("train", 8 if arguments.quick else 46)
    torch.set_num_threads(1)
    rows = [*equality(bench, models, batch), *speed(bench, models, batch, 1 if arguments.quick else 6)]
    torch.set_num_threads(threads)
    if arguments.train_steps:
        rows += training(bench, arguments.train_steps, arguments.seeds)
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    """Which run, and whether to train."""
    tiny_run.options(parser)
    parser.add_argument("--train-steps", type=int, default=0, help="steps of training, both ways  [0: none]")
    parser.add_argument("--seeds", type=int, default=3, help="orders of data, 2 at least")


if __name__ == "__main__":
    harness.script("attention", __doc__, measure, options)
