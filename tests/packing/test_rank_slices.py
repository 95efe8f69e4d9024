"""Rows are distributed over processes and passes: each once, equal numbers of passes, idle ones without effect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordexp.packing.collator import WHOLE, RankSlice, rank_batches, teacher_segment
from helpers import new_checkpoint


@given(n_rows=st.integers(1, 40), count=st.integers(1, 9), size=st.integers(0, 7))
def test_every_row_is_run_once_with_equal_numbers_of_forward_passes(n_rows, count, size):
    chunks = [RankSlice(index, count, size).chunks(n_rows) for index in range(count)]
    assert sorted(row for own in chunks for chunk in own for row in chunk) == list(range(n_rows))
    assert len({len(own) for own in chunks}) == 1
    loads = [sum(map(len, own)) for own in chunks]
    assert max(loads) - min(loads) <= 1
    if size:
        assert max(len(chunk) for own in chunks for chunk in own) <= size
    else:
        assert len(chunks[0]) == 1


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


def test_one_process_alone_runs_the_whole_step_as_one_batch(world, checkpoint):
    collator = world.collator(checkpoint)
    segments = [teacher_segment(sample) for sample in world.samples]
    (batch,) = rank_batches(collator, segments, collator.rows(segments), WHOLE)
    whole = collator(segments)
    for name in ("input_ids", "position_ids", "text_slots", "coord_slots", "coord_targets"):
        assert torch.equal(getattr(batch, name), getattr(whole, name)), name
    assert (batch.n_segments, batch.n_tokens) == (whole.n_segments, whole.n_tokens)


def test_slices_supervise_and_count_everything_once(world, checkpoint):
    collator = world.collator(checkpoint)
    segments = [teacher_segment(sample) for sample in world.samples]
    rows = collator.rows(segments)
    count = len(rows) + 1  # so the last process is idle
    parts = [b for index in range(count) for b in rank_batches(collator, segments, rows, RankSlice(index, count))]
    whole = collator(segments)
    for name in ("text_targets", "text_weights", "coord_targets"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined.sort().values, getattr(whole, name).sort().values), name
    assert sum(p.n_segments for p in parts) == len(segments)
    assert sum(p.n_tokens for p in parts) == whole.n_tokens
    assert (len(parts[-1].text_slots), len(parts[-1].coord_slots), parts[-1].n_tokens) == (0, 0, 0)
