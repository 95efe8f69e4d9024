"""The packed re-scoring forward, beside generating the tokens that it scores.

    PYTHONPATH=src python -m benchmarks.rescore --profile tiny

The stage-1 model answers pictures of val in batches as the stage does, then the answers are re-scored in as many packed
forwards. Both read the pictures and prompts, and with a model as small as this, that is most of the work.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.harness import Row, side_by_side

from benchmarks import harness, tiny_run
from coordexp.rollout.decode import coord_positions
from coordexp.rollout.engine import DecodeRequest, Generation
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.rescore import rescore
from coordexp.rollout.stages import make_reader
from coordexp.stage import LOG, tune_allocator
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
    request = DecodeRequest(params=run.params.decode, codec=run.params.text.codec, seed=run.params.seed)
    briefly = replace(request, params=request.params.model_copy(update={"max_new_tokens": 1}))
    reader = make_reader(checkpoint)
    collator = make_collator(checkpoint, run.paths.raw, run.profile.packing.pack_tokens)
    generations: list[Generation] = engine.generate(samples, request)
    positions = [coord_positions(reader.parse(generation)) for generation in generations]
    rounds = 1 if arguments.quick else 3
    contestants = {
        "generate": lambda: engine.generate(samples, request),
        "read": lambda: engine.generate(samples, briefly),
        "rescore": lambda: rescore(checkpoint, collator, samples, generations, positions, batch),
    }
    times = side_by_side(contestants, rounds, warm_up=not arguments.quick)
    few, single = samples[: max(1, len(samples) // 8)], HfEngine(checkpoint, run.paths.raw, 1)
    one_by_one = {
        "generate": lambda: single.generate(few, request),
        "rescore": lambda: rescore(checkpoint, collator, few, generations[: len(few)], positions[: len(few)], batch),
    }
    share, of_reading = times.ratio("rescore", "generate"), times.ratio("rescore", "read")
    share_alone = side_by_side(one_by_one, rounds, warm_up=False).ratio("rescore", "generate")
    what = f"{sum(len(g.ids) for g in generations):,} tokens of {len(samples)} images in batches of {batch}"
    in_batches = f"{what}; reading pictures and prompts is {times.ratio('read', 'generate'):.0%} of it"
    alone, target, met = "generating one image at a time", f"<= {SHARE}", share_alone <= SHARE
    return [
        Row("re-scoring: share of generating", share, "", in_batches, target, share <= SHARE),
        Row("re-scoring: share, one by one", share_alone, "", alone, target, met),
        Row("re-scoring: beside reading alone", of_reading, "x", "the forward over pictures and prompts", "", None),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """Which run, and how many pictures."""
    tiny_run.options(parser)
    parser.add_argument("--images", type=int, default=128)


if __name__ == "__main__":
    harness.script("rescore", __doc__, measure, options)
