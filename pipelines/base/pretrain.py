"""Pretrain the embedded base model: `python -m pipelines.base.pretrain` (resumes when run again)."""

from __future__ import annotations

import logging
from pathlib import Path

from ruamel.yaml import YAML

from coordexp.models.pixel_format import pixel_spec
from coordexp.models.tiny import build_tiny
from coordexp.packing.collator import Collator
from coordexp.records.scenes.sprites import load_catalog
from coordexp.text.tiny_tokenizer import build_tiny_tokenizer
from coordexp.training.loop import LoopSettings, train
from coordexp.training.pretrain import CurriculumPhase, TextTask, prepare_base_samples, save_bf16
from coordexp.training.schedule import trapezoid_schedule

DATA, STATE, OUT = Path("data/base"), Path(".resume/base"), Path("models/tiny-base")


def main() -> None:
    """Tokenise the scenes, train, write the checkpoint."""
    params = YAML(typ="safe").load(Path("pipelines/base/params.yaml"))
    options, seed = params["train"], params["seed"]
    tokenizer = build_tiny_tokenizer(load_catalog(Path(params["sprites"])).seen)
    model = build_tiny(tokenizer, seed)
    pixels = pixel_spec(model.config, 64 * 64, 192 * 192)
    phases = []
    for phase, phase_options in params["phases"].items():
        samples = DATA / f"{phase}.parquet"
        prepare_base_samples(DATA / phase, samples, tokenizer, pixels, phase_options["task_shares"], seed)
        phases.append(
            CurriculumPhase(
                samples=samples,
                image_root=DATA / phase,
                steps=phase_options["steps"],
                samples_per_step=phase_options["samples_per_step"],
            )
        )
    steps = sum(phase.steps for phase in phases)
    collators = [
        Collator(p.image_root, pixels, model.config.image_token_id, tokenizer.pad_token_id, options["pack_tokens"])
        for p in phases
    ]
    settings = LoopSettings(
        steps=steps,
        schedule=trapezoid_schedule(steps, options["warmup_steps"], options["decay_share"]),
        lr=options["lr"],
        optimizer="muon",
        weight_decay=0.0,
        row_lr_factor=1.0,
        max_grad_norm=1.0,
        precision="bf16",
        log_every=25,
        save_every_seconds=240,
    )
    task = TextTask(model, collators, phases, options["desc_weight"], seed)
    train(model, task, settings, STATE, OUT / "train_log.jsonl")
    save_bf16(model, tokenizer, OUT)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
