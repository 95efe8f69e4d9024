"""The packing plan of a data set of COCO's size, compared with the bin packing of an established package.

    PYTHONPATH=src python -m benchmarks.packing_plan

Lengths as `norm1000` gives them: prompt, visual tokens of the resized picture, and the answer of the `json` codec with
Qwen's vocabulary. `binpacking` comes from benchmarks/requirements.txt; without it, its rows are left out.
"""

from __future__ import annotations

import argparse
import importlib.util

import numpy as np
from benchmarks.coco_like import TRAIN_IMAGES, scenes
from benchmarks.harness import Row, measured, side_by_side, timed, unmeasured
from numpy.typing import NDArray

from benchmarks import harness
from coordexp.packing.pixels import PixelSpec, resized_size
from coordexp.packing.planner import plan_packs

# Qwen3-VL's patches, and the sizes of the production profiles.
PIXELS = PixelSpec(patch_size=16, merge_size=2, temporal_patch_size=2, min_pixels=256 * 256, max_pixels=1024 * 1024)
PACK_TOKENS = 8_192
PROMPT_TOKENS = 20
TOKENS_PER_OBJECT = 27  # `json` with Qwen's vocabulary (NOTES.md)
FILL, SECONDS, ROUNDS = 0.995, 2.0, 3


def coco_lengths(n_samples: int) -> NDArray[np.int64]:
    """Tokens by sample."""
    made = scenes(n_samples)
    rng = np.random.default_rng(3)
    visual = np.array([PIXELS.tokens(*resized_size(*wh, PIXELS)) for wh in made.sizes_wh_I2.tolist()])
    spelled = rng.binomial(made.counts_I, 0.3) + 4  # names of two tokens; container and end of turn
    return PROMPT_TOKENS + visual + TOKENS_PER_OBJECT * made.counts_I + spelled


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Fill and seconds of both planners on the same lengths."""
    lengths = coco_lengths(2_000 if arguments.quick else TRAIN_IMAGES)
    what = f"{len(lengths):,} samples, packs of {PACK_TOKENS:,}"
    *_, plan = timed(lambda: plan_packs(lengths, PACK_TOKENS, seed=17))
    times = side_by_side({"ours": lambda: plan_packs(lengths, PACK_TOKENS, seed=17)}, ROUNDS, warm_up=False)
    least = -(-plan.used_tokens // PACK_TOKENS)
    beside = f"{len(plan.packs):,} packs; no plan has fewer than {least:,}"
    rows = [
        measured(f"planner: fill, {what}", plan.fill, "", beside, at_least=FILL),
        measured("planner: time", times.of("ours"), "s", what, at_most=SECONDS),
    ]
    if importlib.util.find_spec("binpacking") is None:
        return [
            *rows,
            unmeasured("planner: beside binpacking", "needs benchmarks/requirements.txt, which make bench installs"),
        ]
    import binpacking

    count = min(len(lengths), arguments.theirs)
    part = lengths[:count]
    bins, ours = binpacking.to_constant_volume(part.tolist(), PACK_TOKENS), plan_packs(part, PACK_TOKENS, seed=17)
    ways = {
        "theirs": lambda: binpacking.to_constant_volume(part.tolist(), PACK_TOKENS),
        "ours": lambda: plan_packs(part, PACK_TOKENS, seed=17),
    }
    times = side_by_side(ways, ROUNDS, warm_up=False)
    their_fill = part.sum() / (len(bins) * PACK_TOKENS)
    beside = f"binpacking.to_constant_volume on the same {count:,} samples: {times.of('theirs').value:.2f} s"
    gain, theirs = ours.fill - their_fill, f"their fill {their_fill:.5f}"
    return [
        *rows,
        measured("planner: times faster", times.ratio("theirs", "ours"), "x", beside),
        measured("planner: fill beside theirs", gain, "", theirs, at_least=0),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """How much of the data the package is given: its time grows with the square."""
    parser.add_argument("--theirs", type=int, default=20_000, help="samples for binpacking")


if __name__ == "__main__":
    harness.script("packing_plan", __doc__, measure, options)
