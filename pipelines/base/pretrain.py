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
    pixels = pixel_spec(model.config, 96 * 96, 192 * 192)
    phases = []
    for phase, steps in (("easy", options["easy_steps"]), ("general", options["steps"] - options["easy_steps"])):
        samples = DATA / f"{phase}.parquet"
        if not samples.exists():
            prepare_base_samples(DATA / phase, samples, tokenizer, pixels, params["task_shares"], seed)
        phases.append(CurriculumPhase(samples=samples, image_root=DATA / phase, steps=steps))
    collators = [
        Collator(p.image_root, pixels, model.config.image_token_id, tokenizer.pad_token_id, options["pack_tokens"])
        for p in phases
    ]
    settings = LoopSettings(
        steps=options["steps"],
        schedule=trapezoid_schedule(options["steps"], options["warmup_steps"], options["decay_share"]),
        lr=options["lr"],
        optimizer="muon",
        weight_decay=0.0,
        row_lr_factor=1.0,
        max_grad_norm=1.0,
        precision="bf16",
        log_every=25,
        save_every_seconds=240,
    )
    train(model, TextTask(model, collators, phases, options["samples_per_step"], seed), settings, STATE, OUT / "train_log.jsonl")
    save_bf16(model, tokenizer, OUT)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
