"""Every stream of random numbers by name: what it draws, and what it mixes into the seed.

A new choice gets a stream of its own, with numbers that no other one has: then it changes no result of the choices that
there are. Per-record choices (`records/mixing.py`, `records/policy.py`) hash the seed with the record's own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_FAR = 1_000_003  # a prime: neighboring indices get seeds that are far apart
_SEEDS_31 = 2**31  # of engines whose seeds are 31-bit numbers
_SEEDS_63 = 2**63
_REPETITIONS = 1000  # apart from the small numbers that are added below


@dataclass(frozen=True, slots=True)
class Stream:
    """How the numbers of one stream come from the seed and an index."""

    draws: str
    added: int = 0  # to the seed
    mixed: tuple[int, ...] = ()  # after the seed
    seeded: bool = True  # False: the same numbers under every seed
    stride: int = 0  # `stream_seed` adds it once for each unit of the index
    modulus: int = _SEEDS_63


STREAMS = {
    # Of `seed`.
    "pack/order": Stream("which of the samples of one length is packed where; order of the packs", mixed=(1000,)),
    "rollout/images": Stream("training images that get a rollout", mixed=(2,)),
    "monitor/images": Stream("dev images of the evaluation during training", mixed=(3,), seeded=False),
    "evaluation/resamples": Stream("images of each bootstrap resample"),
    "evaluation/dealt": Stream("to which image each answer is dealt, of the blind control", mixed=(1001,)),
    "gallery/images": Stream("pictures of the gallery beside the telling ones"),
    "probe/order": Stream("order in which a model is told its own objects; index: image id", mixed=(1003,)),
    "model/coordinate-rows": Stream("directions along which `coord_init: ordinal` orders the new rows"),
    "decode/answer": Stream("tokens sampled in memory; index: image id", stride=_FAR),
    "decode/request": Stream("tokens that a server samples; index: image id", stride=_FAR, modulus=_SEEDS_31),
    "decode/fresh-rollouts": Stream("seed of one fresh set; index: its step", stride=_FAR, modulus=_SEEDS_31),
    # Of the seed of a repetition of stage 1 or stage 2.
    "train/torch": Stream("dropout, and new adapters"),
    "train/process": Stream(
        "dropout where no generator is saved; index: 65,536 times the step, and the process", stride=_FAR
    ),
    "train/object-order": Stream("order of objects in an answer; index: step, sample"),
    "stage1/order": Stream("packs of each step; index: epoch"),
    "stage1-control/order": Stream("packs of each step; index: epoch", added=2),
    "stage2/order-a": Stream("samples of the steps of channel A; index: epoch", added=1),
    "stage2/order-b": Stream("samples of the steps of channel B; index: epoch", added=2),
    "stage2/order-fresh": Stream("samples of channel B that fresh rollouts are made of; index: epoch", mixed=(1002,)),
}
# Streams that meet under one seed, as (name, index): numpy takes [seed] for [seed, 0]. What one of them draws is of
# another kind or from another set than what the other one does, and other numbers would change every committed result.
MEETINGS = {
    frozenset({"evaluation/resamples", "gallery/images"}),
    frozenset({"evaluation/resamples", "stage1/order"}),
    frozenset({"evaluation/resamples", "train/object-order"}),
    frozenset({"gallery/images", "stage1/order"}),
    frozenset({"gallery/images", "train/object-order"}),
    frozenset({"stage1/order", "train/object-order"}),
    frozenset({"stage1/order", "rollout/images"}),  # in epoch 2
    frozenset({"rollout/images", "train/object-order"}),  # in step 2
    frozenset({"stage1-control/order", "stage2/order-b"}),  # packs, samples
}


def entropy(seed: int, name: str, *index: int) -> list[int]:
    """What numpy makes the numbers of a stream from."""
    stream = STREAMS[name]
    return [*([seed + stream.added] if stream.seeded else []), *stream.mixed, *index]


def generator(seed: int, name: str, *index: int) -> np.random.Generator:
    """The numbers of a stream, or of one of its parts (an epoch, say)."""
    import numpy as np  # parameters are checked without it

    return np.random.default_rng(entropy(seed, name, *index))


def stream_seed(seed: int, name: str, index: int = 0) -> int:
    """The seed of a stream whose numbers others draw: torch, or a server."""
    stream = STREAMS[name]
    return (seed + stream.added + stream.stride * index) % stream.modulus


def draw_seed(seed: int, draw: int) -> int:
    """The seed of one of several answers to one question; draw 0 has `seed` itself, the others those after it."""
    return seed + draw


def repetition_seed(seed: int, repetition: int) -> int:
    """The seed of one repetition of a training stage; repetition 0 has `seed` itself."""
    return seed + _REPETITIONS * repetition
