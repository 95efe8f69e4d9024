"""A training step of the `tiny` profile: samples per second and memory, compared with a plain loop.

    PYTHONPATH=src python -m benchmarks.training_step --profile tiny

ours    stage 1 as the stage runs it: packed rows, logits at supervised slots only, all coordinate losses, kept memory
padded  a plain loop over transformers' own model (SDPA, Conv3d): padded batches, full logits, text cross-entropy
kept    the same with freed memory kept, as ours has it (stage.py)
trl     TRL's SFTTrainer on that model and those batches (benchmarks/trl_loop.py), without its gradient checkpointing

Samples, precision and optimizer (AdamW) are the same; the processes alternate. `ours` also reports the fraction of a
step that it waits for data, and its fraction of peak (MFU): the operations of a step without recomputation
(benchmarks/gpu_check/shapes.py:step_flops), relative to the rate of a large product with equal threads and precision.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from benchmarks.gpu_check.shapes import step_flops
from benchmarks.harness import Figure, Row, cpu_seconds, measured, run_child, side_by_side, unmeasured
from benchmarks.tiny_run import TinyRun
from torch import Tensor

from benchmarks import harness, tiny_run, trl_loop
from coordexp.config.profile import OptimConfig
from coordexp.models.loading import Checkpoint
from coordexp.packing.collator import Collator, teacher_segment
from coordexp.packing.pixels import load_sample_rgb, patchify
from coordexp.packing.planner import read_packs
from coordexp.packing.samples import Sample, SampleSource, SampleStore
from coordexp.stage import LOG, tune_allocator
from coordexp.training.builders import first_coord_id, make_encoder
from coordexp.training.loop import train
from coordexp.training.optimizers import build_optimizer
from coordexp.training.step import Criterion, TeacherTask

WAITING = 0.03
WARM_STEPS = 2
LR = 1e-4
BESIDE = {
    "padded": "padded batches, full logits, cross-entropy alone",
    "kept": "the same with freed memory kept, as ours",
    "trl": "TRL's SFTTrainer on the padded batches",
}
AIMED = {"padded": 1.8, "trl": 2.6}
PEAK_SIDE = 2048  # of the square matrices whose product shows the peak
NO_TRL = "needs benchmarks/requirements.txt, which make bench installs"


def step_packs(run: TinyRun, steps: int) -> list[list[list[int]]]:
    """The packs of each step, as planned."""
    packs, size = read_packs(run.paths.packed / "plan.parquet"), run.profile.stage1.packs_per_step
    return [packs[i * size : (i + 1) * size] for i in range(steps)]


def adamw(run: TinyRun, steps: int) -> OptimConfig:
    """What both loops step with: stage 1's block, without what only one of them would do."""
    plain = {"optimizer": "adamw", "lr": LR, "coord_row_lr_factor": 1.0, "weight_decay": 0.0}
    return run.profile.stage1.model_copy(update={"steps": steps, "log_every": steps, **plain})


def ours(run: TinyRun, checkpoint: Checkpoint, steps: int) -> dict[str, float]:
    """Stage 1's own loop."""
    tune_allocator(LOG)
    store = SampleStore(run.paths.norm1000 / "train.parquet")
    collator = checkpoint.collator(run.paths.raw, run.profile.packing.pack_tokens)
    source = SampleSource(store, make_encoder(checkpoint), run.params.text.object_order, seed=0)
    criterion = Criterion.stage1(run.params, first_coord_id(checkpoint), steps)
    task = TeacherTask(checkpoint.model, criterion, source, collator, step_packs(run, steps))
    optim = adamw(run, steps)
    began = cpu_seconds()
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        train(checkpoint.model, task, optim, Path(folder), log, save_every_seconds=1e9, schedule=lambda _: 1.0)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    cpu = (cpu_seconds() - began) / sum(row["samples"] for row in rows)
    timed = rows[WARM_STEPS:]
    seconds = [row["time/step_s"] / row["samples"] for row in timed]
    whole = sum(row["time/step_s"] for row in timed)
    waiting = sum(row["time/wait_s"] for row in timed) / whole
    operations = sum(operations_of(checkpoint, collator, store, packs) for packs in step_packs(run, steps)[WARM_STEPS:])
    share = operations / whole / peak_flops(torch.bfloat16 if optim.precision == "bf16" else torch.float32)
    return {"seconds_per_sample": median(seconds), "cpu_per_sample": cpu, "waiting": waiting, "share_of_peak": share}


def operations_of(checkpoint: Checkpoint, collator: Collator, store: SampleStore, packs: list[list[int]]) -> float:
    """Of a step on these packs."""
    batch = collator([teacher_segment(store[i]) for pack in packs for i in pack])
    return step_flops(checkpoint.model, batch)


def peak_flops(dtype: torch.dtype) -> float:
    """Operations a second of a large product, by the threads of this process; the best of some rounds."""
    matrix = torch.randn(PEAK_SIDE, PEAK_SIDE).to(dtype)
    times = side_by_side({"product": lambda: matrix @ matrix}, rounds=8)
    return 2 * PEAK_SIDE**3 / min(times.of("product").rounds)


def padded_batch(checkpoint: Checkpoint, root: Path, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What a processor and a padding collator make of the samples; labels are the answers."""
    image_id, pixels = checkpoint.model.config.image_token_id, checkpoint.pixels
    prompts = [s.expanded_prompt_ids(image_id) for s in samples]
    width = max(len(p) + len(s.answer_ids) for p, s in zip(prompts, samples, strict=True))
    ids = np.full((len(samples), width), checkpoint.tokenizer.pad_token_id, np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, -100)
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        end = len(prompt) + len(sample.answer_ids)
        ids[row, :end] = np.concatenate([prompt, sample.answer_ids])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = sample.answer_ids
    images = [load_sample_rgb(root, s.image, s.resized_width, s.resized_height) for s in samples]
    grids = [(1, image.shape[0] // pixels.patch_size, image.shape[1] // pixels.patch_size) for image in images]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "mm_token_type_ids": torch.from_numpy((ids == image_id).astype(np.int64)),
        "labels": torch.from_numpy(labels),
        "pixel_values": torch.from_numpy(np.concatenate([patchify(image, pixels) for image in images])),
        "image_grid_thw": torch.tensor(grids),
    }


def padded(run: TinyRun, checkpoint: Checkpoint, steps: int) -> dict[str, float]:
    """The loop of a tutorial."""
    store, model = SampleStore(run.paths.norm1000 / "train.parquet"), checkpoint.model
    optim = adamw(run, steps)
    optimizer = build_optimizer(model, optim)
    model.train()
    seconds, n_samples, began = [], 0, cpu_seconds()
    for packs in step_packs(run, steps):
        started = time.perf_counter()
        samples = [store[i] for pack in packs for i in pack]
        batch = padded_batch(checkpoint, run.paths.raw, samples)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=optim.precision == "bf16"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append((time.perf_counter() - started) / len(samples))
        n_samples += len(samples)
    cpu = (cpu_seconds() - began) / n_samples
    return {"seconds_per_sample": median(seconds[WARM_STEPS:]), "cpu_per_sample": cpu}


def kept(run: TinyRun, checkpoint: Checkpoint, steps: int) -> dict[str, float]:
    """The loop of a tutorial under our allocator settings."""
    tune_allocator(LOG)
    return padded(run, checkpoint, steps)


def trl(run: TinyRun, checkpoint: Checkpoint, steps: int) -> dict[str, float]:
    """TRL's trainer."""
    store, optim = SampleStore(run.paths.norm1000 / "train.parquet"), run.profile.stage1
    seconds, cpu = trl_loop.seconds_per_sample(
        checkpoint,
        lambda batch: padded_batch(checkpoint, run.paths.raw, [store[i] for i in batch]),
        [[i for pack in packs for i in pack] for packs in step_packs(run, steps)],
        WARM_STEPS,
        learning_rate=LR,
        max_grad_norm=optim.max_grad_norm,
        bf16=optim.precision == "bf16",
    )
    return {"seconds_per_sample": seconds, "cpu_per_sample": cpu}


def child(arguments: argparse.Namespace) -> None:
    """Train one way and print its figures."""
    run = tiny_run.open_run(arguments)
    load = run.checkpoint if arguments.child == "ours" else run.plain_checkpoint
    checkpoint = load(run.paths.norm1000 / "init")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"ours": ours, "padded": padded, "kept": kept, "trl": trl}[arguments.child](
        run, checkpoint, arguments.steps
    )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(figures | {"extra_gib": (after - before) / 2**20}))


def runs_of(arguments: argparse.Namespace, names: Sequence[str], rounds: int) -> Iterator[dict[str, dict[str, float]]]:
    """Figures of each way, in turns."""
    for _ in range(rounds):
        found = {}
        for name in names:
            options = ["--child", name, "--profile", arguments.profile, "--root", str(arguments.root)]
            command = [sys.executable, "-m", "benchmarks.training_step", *options]
            output = run_child([*command, "--steps", str(arguments.steps)]).output
            found[name] = json.loads(output.splitlines()[-1])
        yield found


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Ratios of samples per second and of memory."""
    if arguments.child:
        child(arguments)
        raise SystemExit(0)
    run = tiny_run.open_run(arguments)
    folders = (run.paths.norm1000 / "init", run.paths.packed, run.paths.raw)
    if missing := tiny_run.absent("training step", arguments, *folders):
        return missing
    if arguments.quick:
        arguments = argparse.Namespace(**vars(arguments) | {"steps": WARM_STEPS + 1})
    has_trl = all(find_spec(name) for name in ("trl", "datasets"))
    names = ["ours", *(name for name in BESIDE if name != "trl" or has_trl)]
    found = list(runs_of(arguments, names, rounds=1 if arguments.quick else 3))

    def beside(name: str, key: str) -> list[float]:
        return [f[name][key] / f["ours"][key] for f in found]

    seconds = Figure(*([f["ours"][key] for f in found] for key in ("seconds_per_sample", "cpu_per_sample")))
    share, waiting = (Figure([f["ours"][key] for f in found]) for key in ("share_of_peak", "waiting"))
    product = f"of a product of {PEAK_SIDE} x {PEAK_SIDE} matrices by the same threads"
    rows = [
        measured("training step: ours", seconds.map(lambda s: 1 / s), "samples/s", "stage 1 of the profile with AdamW"),
        measured("training step: share of peak (MFU)", share, "", product),
        measured("training step: waiting for data", waiting, "", "of a step", at_most=WAITING),
    ]
    for name in names[1:]:
        ratio = Figure(beside(name, "seconds_per_sample"), beside(name, "cpu_per_sample"))
        rows.append(
            measured(f"training step: times faster than {name}", ratio, "x", BESIDE[name], at_least=AIMED.get(name))
        )
        memory = Figure(beside(name, "extra_gib")).map(lambda more: 1 / more)
        rows.append(measured(f"training step: memory beside {name}", memory, "", "growth while training"))
    return (
        rows
        if has_trl
        else [*rows, unmeasured("training step: times faster than trl", NO_TRL, f">= {AIMED['trl']:g} x")]
    )


def options(parser: argparse.ArgumentParser) -> None:
    """Which run, and how long."""
    tiny_run.options(parser)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--child", help=argparse.SUPPRESS)


if __name__ == "__main__":
    harness.script("training_step", __doc__, measure, options)
