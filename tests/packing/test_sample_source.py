"""Object order: as stored, or a reproducible permutation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordexp.geometry.bins import encode_boxes
from coordexp.packing.collator import teacher_segment
from coordexp.packing.samples import permuted
from coordexp.rollout.engine import Generation
from helpers import answer_reader, new_checkpoint


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


def answered(sample, checkpoint) -> list[tuple]:
    parsed = answer_reader(checkpoint).parse(Generation(sample.answer_ids, "stop"))
    assert parsed.report.ok
    return [(o.desc, o.bins) for o in parsed.objects]


def test_top_left_is_the_stored_order(world, checkpoint):
    source = world.source(checkpoint)
    for index, stored in enumerate(world.samples):
        np.testing.assert_array_equal(source.get(index, step=3).answer_ids, stored.answer_ids)


def test_random_order_keeps_annotations_and_answer_together(world, checkpoint):
    source = world.source(checkpoint, "random")
    for index, stored in enumerate(world.samples):
        sample = source.get(index, step=2)
        n_objects = len(sample.descs) - sum(sample.iscrowd)
        bins = encode_boxes(sample.boxes_xyxy_px, sample.width, sample.height).tolist()
        annotated = list(zip(sample.descs, map(tuple, bins), strict=True))
        assert answered(sample, checkpoint) == annotated[:n_objects]
        assert sorted(answered(sample, checkpoint)) == sorted(answered(stored, checkpoint))
        assert sample.iscrowd == stored.iscrowd
        assert sample.length == stored.length
        assert len(teacher_segment(sample).box_targets) == n_objects


def test_areas_stay_with_their_objects(world, checkpoint):
    stored = world.store[0]
    areas_px2 = tuple(map(float, range(len(stored.descs))))
    sample = permuted(replace(stored, areas_px2=areas_px2), world.encoder(checkpoint), np.random.default_rng(2))
    order = [stored.boxes_xyxy_px.tolist().index(box) for box in sample.boxes_xyxy_px.tolist()]
    assert order != sorted(order)
    assert sample.areas_px2 == tuple(map(float, order))


def test_crowds_stay_last(world, checkpoint):
    stored = world.store[1]
    for step in range(6):
        sample = world.source(checkpoint, "random").get(1, step)
        assert sample.descs[-1] == stored.descs[-1]
        np.testing.assert_array_equal(sample.boxes_xyxy_px[-1], stored.boxes_xyxy_px[-1])


def test_the_order_is_reproducible_and_changes_with_step_and_sample(world, checkpoint):
    source, again = world.source(checkpoint, "random"), world.source(checkpoint, "random")
    orders = [source.get(0, step).descs for step in range(20)]
    assert [again.get(0, step).descs for step in reversed(range(20))] == orders[::-1]
    assert len(set(orders)) == 6  # three objects: every order occurs
