"""Pretrain the embedded base model: `python -m pipelines.base.pretrain` (resumes when run again)."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from ruamel.yaml import YAML

from coordexp.config.profile import OptimConfig
from coordexp.models.processor import pixel_spec
from coordexp.models.tiny import build_tiny
from coordexp.packing.collator import Collator
from coordexp.records.scenes.sprites import load_catalog
from coordexp.stage import tune_allocator
from coordexp.text.tiny_tokenizer import build_tiny_tokenizer
from coordexp.training.loop import train
from coordexp.training.pretrain import (
    BaseModel,
    CurriculumPhase,
    PretrainWeights,
    TextTask,
    finish_base,
    legs,
    prepare_base_samples,
)
from coordexp.training.schedule import legs_schedule

HOME, STATE = Path("pipelines/base"), Path(".resume/base")
MIN_PIXELS, MAX_PIXELS = 64 * 64, 192 * 192


def main() -> None:
    """Tokenise the scenes, train, write the checkpoint with its log, metrics and metadata."""
    started = time.monotonic()
    params = YAML(typ="safe").load(HOME / "params.yaml")
    options, seed = params["train"], params["seed"]
    tokenizer = build_tiny_tokenizer(load_catalog(Path(params["sprites"])).seen)
    vlm = build_tiny(tokenizer, seed)
    model = BaseModel(vlm)
    pixels = pixel_spec(vlm.config, MIN_PIXELS, MAX_PIXELS)
    phases = []
    for name, phase in params["phases"].items():
        root, samples = HOME / "data" / name, STATE / f"{name}.parquet"
        prepare_base_samples(root, samples, tokenizer, pixels, phase["task_shares"], seed)
        steps, per_step = phase["steps"], phase["samples_per_step"]
        phases.append(CurriculumPhase(samples=samples, image_root=root, steps=steps, samples_per_step=per_step))
    collators = [
        Collator(p.image_root, pixels, vlm.config.image_token_id, tokenizer.pad_token_id, options["pack_tokens"])
        for p in phases
    ]
    steps = sum(phase.steps for phase in phases)
    optim = OptimConfig(
        optimizer="muon",
        steps=steps,
        lr=options["lr"],
        coord_row_lr_factor=1.0,
        betas=(0.9, 0.95),
        warmup_steps=options["warmup_steps"],
        weight_decay=0.0,
        precision="bf16",
        max_grad_norm=1.0,
        log_every=25,
        grad_monitor_every=0,
    )
    schedule = legs_schedule(legs(params["phases"]), options["warmup_steps"], options["decay_fraction"])
    task = TextTask(model, collators, phases, PretrainWeights(**options["weights"]), seed)
    train(model, task, optim, STATE, STATE / "train_log.jsonl", save_every_seconds=240, schedule=schedule)
    finish_base(HOME, vlm, tokenizer, pixels, STATE / "train_log.jsonl", params, time.monotonic() - started)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    tune_allocator(logging.getLogger())
    main()
