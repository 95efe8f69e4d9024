"""Training samples in the wanted object order: as tokenised (top-left), or a fresh permutation each time (random)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coordexp.geometry.bins import encode_boxes
from coordexp.infra.random_streams import generator
from coordexp.packing.prepare import text_objects
from coordexp.packing.samples import Sample, SampleStore
from coordexp.text.codecs import AnswerEncoder


class SampleSource:
    """Random access to samples by (index, step); the permutation follows from (seed, step, index) alone.

    A permuted answer has the length of the original one: every object keeps its tokens, only the order changes.
    """

    def __init__(self, store: SampleStore, encoder: AnswerEncoder, object_order: str, seed: int) -> None:
        self.store = store
        self._encoder = encoder
        self._random = object_order == "random"
        self._seed = seed

    def get(self, index: int, step: int) -> Sample:
        """The sample as step `step` trains on it."""
        sample = self.store[index]
        return (
            permuted(sample, self._encoder, generator(self._seed, "train/object-order", step, index))
            if self._random
            else sample
        )


def permuted(sample: Sample, encoder: AnswerEncoder, rng: np.random.Generator) -> Sample:
    """The sample with its (non-crowd) objects in random order, in annotations and answer alike."""
    n_objects = len(sample.descs) - sum(sample.iscrowd)  # crowd objects stand last and are not in the answer
    order = rng.permutation(n_objects)
    full_order = [*order.tolist(), *range(n_objects, len(sample.descs))]
    boxes = sample.boxes_xyxy_px[full_order]
    descs = tuple(sample.descs[i] for i in full_order)
    bins = encode_boxes(boxes[:n_objects], sample.width, sample.height)
    answer = encoder.encode(text_objects(descs[:n_objects], bins))
    return replace(
        sample,
        answer_ids=answer.ids,
        answer_roles=answer.roles,
        answer_objects=answer.object_index,
        descs=descs,
        boxes_xyxy_px=boxes,
        areas_px2=tuple(sample.areas_px2[i] for i in full_order) if sample.areas_px2 else (),
    )
