"""All streams of random numbers by name: what each is used for, and what it mixes into the seed.

A new random choice gets its own stream with unique numbers, so that it does not change the results of existing choices.
Choices per record (`records/mixing.py`, `records/policy.py`) hash the seed together with the content of the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_FAR = 1_000_003  # a prime: neighboring indices get seeds that are far apart
_SEEDS_31 = 2**31  # for engines with 31-bit seeds
_SEEDS_63 = 2**63
_REPETITIONS = 1000  # larger than the small numbers that are added below


@dataclass(frozen=True, slots=True)
class Stream:
    """How one stream derives its numbers from the seed and an index."""

    draws: str
    added: int = 0  # to the seed
    mixed: tuple[int, ...] = ()  # after the seed
    seeded: bool = True  # False: the same numbers under every seed
    stride: int = 0  # `stream_seed` adds it once per unit of the index
    modulus: int = _SEEDS_63


STREAMS = {
    # Of `seed`.
    "pack/order": Stream("assignment of equally long samples to packs; order of the packs", mixed=(1000,)),
    "rollout/images": Stream("training images that get a rollout", mixed=(2,)),
    "monitor/images": Stream("dev images of the evaluation during training", mixed=(3,), seeded=False),
    "evaluation/resamples": Stream("images of each bootstrap resample"),
    "evaluation/dealt": Stream("shuffling of predictions across images for the blind control", mixed=(1001,)),
    "gallery/images": Stream("randomly chosen images of the gallery"),
    "probe/order": Stream("order in which a model is given its own objects; index: image id", mixed=(1003,)),
    "model/coordinate-rows": Stream("directions in which `coord_init: ordinal` orders the new embedding rows"),
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
# Pairs of streams that coincide for the same seed, because numpy treats [seed] as [seed, 0]. They are harmless, since
# the two choices are of different kinds or from different sets, and new numbers would change all committed results.
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
    """The entropy that seeds numpy's generator of a stream."""
    stream = STREAMS[name]
    return [*([seed + stream.added] if stream.seeded else []), *stream.mixed, *index]


def generator(seed: int, name: str, *index: int) -> np.random.Generator:
    """The generator of a stream, or of one of its parts (such as an epoch)."""
    import numpy as np  # not needed to check parameters

    return np.random.default_rng(entropy(seed, name, *index))


def stream_seed(seed: int, name: str, index: int = 0) -> int:
    """The seed of a stream whose numbers torch or a server generates."""
    stream = STREAMS[name]
    return (seed + stream.added + stream.stride * index) % stream.modulus


def draw_seed(seed: int, draw: int) -> int:
    """The seed of one of several answers to the same prompt; draw 0 has `seed` itself, the others the next seeds."""
    return seed + draw


def repetition_seed(seed: int, repetition: int) -> int:
    """The seed of one repetition of a training stage; repetition 0 has `seed` itself."""
    return seed + _REPETITIONS * repetition
