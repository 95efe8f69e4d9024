"""Samples are read back as they were written."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.packing.samples import Sample, SampleStore, SampleWriter


def sample(image_id: int, n_objects: int, with_areas: bool = False) -> Sample:
    rng = np.random.default_rng(image_id)
    n = 3 + 4 * n_objects
    return Sample(
        image_id=image_id,
        image=f"images/é{image_id}.jpg",
        width=640,
        height=480,
        resized_width=96,
        resized_height=64,
        n_image_tokens=24,
        prompt_ids=rng.integers(0, 1500, 9).astype(np.int32),
        answer_ids=rng.integers(0, 1500, n).astype(np.int32),
        answer_roles=rng.integers(1, 6, n).astype(np.uint8),
        answer_objects=rng.integers(-1, 4, n).astype(np.int16),
        descs=tuple(f"猫 {i}" for i in range(n_objects)),
        boxes_xyxy_px=rng.uniform(0, 480, (n_objects, 4)).astype(np.float32),
        iscrowd=tuple(i == 1 for i in range(n_objects)),
        areas_px2=tuple(None if i == 1 else 1023.9999999999999 + i for i in range(n_objects)) if with_areas else (),
    )


WRITTEN = [sample(2**40 + i, n_objects=i % 4) for i in range(7)]


def stored(path: Path, samples: list[Sample], rows_per_group: int, with_areas: bool = False) -> SampleStore:
    with SampleWriter(path, rows_per_group, with_areas) as writer:
        for s in samples:
            writer.add(s)
    return SampleStore(path)


@pytest.fixture(params=[2, 3, 100], ids="groups of {}".format)
def store(request, tmp_path):
    return stored(tmp_path / "s.parquet", WRITTEN, request.param)


def test_round_trip(store):
    check_same(store, WRITTEN)


def test_round_trip_of_areas_that_only_late_samples_have(tmp_path):
    samples = [*WRITTEN, *(sample(i, i % 4, with_areas=True) for i in range(5))]
    check_same(stored(tmp_path / "s.parquet", samples, rows_per_group=2, with_areas=True), samples)


def check_same(store: SampleStore, samples: list[Sample]) -> None:
    assert len(store) == len(samples)
    for read, written in zip(store, samples, strict=True):
        for field in fields(Sample):
            a, b = getattr(read, field.name), getattr(written, field.name)
            np.testing.assert_array_equal(a, b, err_msg=field.name)
            assert type(a) is type(b)
            if isinstance(b, np.ndarray):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)


def test_lengths_are_those_of_the_samples(store):
    assert store.lengths().tolist() == [s.length for s in WRITTEN]
    assert WRITTEN[1].prompt_length == 9 - 1 + 24
    assert WRITTEN[1].length == 9 - 1 + 24 + 7


def test_negative_indices_work_and_others_raise(store):
    assert store[-1].image_id == WRITTEN[-1].image_id
    for index in (len(WRITTEN), -len(WRITTEN) - 1):
        with pytest.raises(IndexError):
            store[index]


def test_stages_write_samples_that_match_the_records(world):
    empty, crowd, resized = world.store[3], world.store[1], world.store[5]
    assert empty.descs == ()
    assert empty.boxes_xyxy_px.shape == (0, 4)
    assert crowd.iscrowd == (*[False] * (len(crowd.descs) - 1), True)  # crowds last: they are not in the answer
    assert crowd.answer_objects.max() + 1 == len(crowd.descs) - 1
    assert (resized.width, resized.height) != (resized.resized_width, resized.resized_height)
    assert resized.boxes_xyxy_px.max() <= max(resized.width, resized.height)


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.integers(1, 20))
def test_only_the_image_placeholder_is_repeated(before, after, n):
    short = replace(WRITTEN[0], prompt_ids=np.array([*before, 77, *after], np.int32), n_image_tokens=n)
    expanded = short.expanded_prompt_ids(77)
    assert expanded.tolist() == [*before, *[77] * n, *after]
    assert expanded.dtype == np.int32
    assert len(expanded) == short.prompt_length


@pytest.mark.parametrize("ids", [[1, 2, 3], [77, 1, 77]], ids=["none", "two"])
def test_a_prompt_without_exactly_one_image_is_an_error(ids):
    with pytest.raises(ValueError, match="unpack"):
        replace(WRITTEN[0], prompt_ids=np.array(ids, np.int32)).expanded_prompt_ids(77)
