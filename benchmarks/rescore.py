"""The packed re-scoring forward, beside generating the tokens that it scores.

    PYTHONPATH=src python -m benchmarks.rescore --profile tiny

The stage-1 model answers pictures of val in batches as the stage does, then the answers are re-scored in as many packed
forwards. Image reading is part of both.
"""

from __future__ import annotations

import argparse

from benchmarks import harness, tiny_run
from benchmarks.harness import Row, side_by_side

from coordexp.config.process import LOG, tune_allocator
from coordexp.rollout.decode import EMITTED, coord_positions
from coordexp.rollout.engine import Generation
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.rescore import rescore
from coordexp.rollout.stages import decode_settings, make_reader
from coordexp.training.builders import make_collator

SHARE = 0.10


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Seconds of re-scoring as a share of those of generating."""
    run = tiny_run.open_run(arguments)
    folder = run.paths.run("stage1")
    if missing := tiny_run.absent("re-scoring", arguments, folder, run.paths.norm1000, run.paths.raw):
        return missing
    tune_allocator(LOG)
    checkpoint = run.checkpoint(folder)
    samples = run.samples("val", 8 if arguments.quick else arguments.images)
    batch = run.profile.rollout.batch_images
    engine = HfEngine(checkpoint, run.paths.raw, batch)
    settings = decode_settings(run.params, run.params.text.codec, [])
    reader = make_reader(checkpoint, run.params.text.codec, EMITTED, {})
    collator = make_collator(checkpoint, run.paths.raw, run.profile.packing.pack_tokens)
    generations: list[Generation] = engine.generate(samples, settings)
    positions = [coord_positions(reader.parse(generation)) for generation in generations]
    contestants = {
        "generate": lambda: engine.generate(samples, settings),
        "rescore": lambda: rescore(checkpoint, collator, samples, generations, positions, batch),
    }
    times = side_by_side(contestants, rounds=1 if arguments.quick else 3, warm_up=False)
    share = times.ratio("rescore", "generate")
    n_tokens = sum(len(g.ids) for g in generations)
    beside = f"generating {n_tokens:,} tokens of {len(samples)} images in batches of {batch}: {times.of('generate'):.2f} s"
    return [Row("re-scoring: share of generating", share, "", beside, f"<= {SHARE}", share <= SHARE)]


def options(parser: argparse.ArgumentParser) -> None:
    """Which run, and how many pictures."""
    tiny_run.options(parser)
    parser.add_argument("--images", type=int, default=128)


if __name__ == "__main__":
    harness.script("rescore", __doc__, measure, options)
