"""Packed batches: supervised slots equal textbook shifted labels, and packing does not change losses.

Shapes: B rows, T tokens, V vocabulary, K bins.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from coordexp.geometry.bins import target_bins
from coordexp.models.forward import hidden_states
from coordexp.packing.collator import Segment, segment_positions, teacher_segment
from coordexp.text.codecs import Role
from coordexp.training.step import micro_batch, step_counts
from helpers import criterion_of, new_checkpoint

IGNORED = -100


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


@pytest.fixture(scope="module")
def segments(world) -> list[Segment]:
    return [teacher_segment(sample) for sample in world.samples]


@pytest.fixture(scope="module")
def packed(world, checkpoint, segments):
    """The six samples in rows of at most 256 tokens."""
    return world.collator(checkpoint)(segments)


def flat_labels(batch, segments, rows) -> torch.Tensor:
    """Unshifted labels (B, T): the answer's tokens, everything else ignored."""
    labels = torch.full(batch.input_ids.shape, IGNORED)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            answer = torch.from_numpy(segments[i].answer_ids.astype(np.int64))
            at += segments[i].length
            labels[r, at - len(answer) : at] = answer
    return labels


def test_text_slots_equal_shifted_labels_with_coordinates_masked(world, checkpoint, packed, segments):
    vocabulary = checkpoint.coord
    labels = flat_labels(packed, segments, world.collator(checkpoint).rows(segments))
    labels[(labels >= vocabulary.first_id) & (labels < vocabulary.end_id)] = IGNORED
    logits_BTV = torch.randn(*labels.shape, 1536, generator=torch.Generator().manual_seed(0))
    textbook = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    ours = F.cross_entropy(logits_BTV.flatten(0, 1)[packed.text_slots], packed.text_targets, reduction="sum")
    assert (labels != IGNORED).sum() == len(packed.text_slots) > 0
    assert float(ours) == pytest.approx(float(textbook), rel=1e-6)
    assert (packed.text_weights == 1).all()


def test_coord_slots_are_where_the_shifted_label_is_a_coordinate(world, checkpoint, packed, segments):
    vocabulary, rows = checkpoint.coord, world.collator(checkpoint).rows(segments)
    shifted = flat_labels(packed, segments, rows)[:, 1:]
    r, t = torch.nonzero((shifted >= vocabulary.first_id) & (shifted < vocabulary.end_id), as_tuple=True)
    assert packed.coord_slots.tolist() == (r * packed.input_ids.shape[1] + t).tolist()
    bins = shifted[r, t] - vocabulary.first_id
    assert packed.coord_targets.round().long().tolist() == bins.tolist()
    assert not set(packed.coord_slots.tolist()) & set(packed.text_slots.tolist())


def test_the_token_after_a_slot_is_its_target(packed, checkpoint):
    ids = packed.input_ids.flatten()
    assert ids[packed.text_slots + 1].tolist() == packed.text_targets.tolist()
    assert all(checkpoint.coord.bin_of(i) is not None for i in ids[packed.coord_slots + 1].tolist())


def test_targets_of_boxes_are_not_rounded(world, packed, segments, checkpoint):
    order = [i for row in world.collator(checkpoint).rows(segments) for i in row]
    samples = [world.samples[i] for i in order]
    expected = [
        target_bins(s.boxes_xyxy_px[~np.array(s.iscrowd, bool)], s.width, s.height).reshape(-1) for s in samples
    ]
    np.testing.assert_allclose(packed.coord_targets.numpy(), np.concatenate(expected), rtol=1e-6)
    assert (packed.coord_targets != packed.coord_targets.round()).any()


def test_crowds_are_not_supervised(world):
    sample = world.store[1]
    assert sum(sample.iscrowd) == 1
    segment = teacher_segment(sample)
    assert segment.box_tokens.shape == segment.box_targets.shape == (len(sample.descs) - 1, 4)


def test_the_batch_contains_the_roles(packed):
    counts = {role: int((packed.text_roles == role).sum()) for role in Role}
    assert counts[Role.COORD] == counts[Role.PROMPT] == counts[Role.NUMBER] == 0
    assert counts[Role.CLOSE] == 2 * packed.n_segments
    assert counts[Role.STRUCT] == 5 * len(packed.coord_targets) / 4


def test_shapes(packed, segments, checkpoint):
    rows, width = packed.input_ids.shape
    assert rows < len(segments) == packed.n_segments == len(packed.image_grid_thw)
    assert packed.position_ids.shape == (4, rows, width)
    assert len(packed.pixel_values) == packed.image_grid_thw.prod(-1).sum()
    image_tokens = (packed.input_ids == checkpoint.model.config.image_token_id).sum()
    assert image_tokens == packed.image_grid_thw.prod(-1).sum() // 4
    assert packed.n_tokens == sum(s.length for s in segments) < packed.input_ids.numel()  # some row is padded


def test_text_positions_restart_at_every_segment_and_at_the_padding(packed, segments, world, checkpoint):
    for r, row in enumerate(world.collator(checkpoint).rows(segments)):
        starts = np.cumsum([0, *(segments[i].length for i in row)])
        expected = set(starts[starts < packed.input_ids.shape[1]].tolist())
        assert set(torch.nonzero(packed.position_ids[0, r] == 0).flatten().tolist()) == expected


def test_segments_end_where_text_positions_restart(packed):
    starts = torch.nonzero(packed.position_ids[0].flatten() == 0).flatten().tolist()
    assert list(packed.segments) == np.diff([*starts, packed.input_ids.numel()]).tolist()
    assert list(packed.pictures) == packed.image_grid_thw.prod(-1).tolist()


def step_loss(checkpoint, batches, segments):
    """Loss and gradient of one step, its batches accumulated, all terms on."""
    criterion, counts = criterion_of(checkpoint), step_counts(segments)
    checkpoint.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = micro_batch(checkpoint.model, criterion, batch, counts).loss
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in checkpoint.model.parameters() if p.grad is not None])


def test_packed_loss_and_gradient_equal_unpacked_ones(world, checkpoint, packed, segments):
    alone = [world.collator(checkpoint).layout([segment], [[0]]) for segment in segments]
    loss, gradient = step_loss(checkpoint, [packed], segments)
    loss_alone, gradient_alone = step_loss(checkpoint, alone, segments)
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    assert (gradient - gradient_alone).norm() < 1e-4 * gradient.norm()


def test_without_segment_lengths_the_model_attends_across_segments(checkpoint, packed):
    """Control for the test above: if each row is one segment, attention leaks between segments."""
    rows, width = packed.input_ids.shape
    leaking = replace(packed, segments=(width,) * rows)
    with torch.no_grad():
        apart, together = (hidden_states(checkpoint.model, batch) for batch in (packed, leaking))
    assert (apart - together).abs().max() > 0.1


def test_padding_leaks_nothing(world, checkpoint, segments):
    """Real tokens do not depend on content or length of the padding."""
    collator, short, long = world.collator(checkpoint), segments[3], segments[0]
    assert short.length < long.length
    both = collator.layout([short, long], [[0], [1]])
    other_padding = replace(both, input_ids=both.input_ids.clone())
    other_padding.input_ids[0, short.length :] = 77
    with torch.no_grad():
        hidden = [hidden_states(checkpoint.model, b) for b in (both, other_padding, collator.layout([short], [[0]]))]
        long_alone = hidden_states(checkpoint.model, collator.layout([long], [[0]]))
    width = both.input_ids.shape[1]
    torch.testing.assert_close(hidden[0][: short.length], hidden[1][: short.length], rtol=0, atol=0)
    torch.testing.assert_close(hidden[0][: short.length], hidden[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden[0][width:], long_alone, rtol=1e-4, atol=1e-4)


def test_positive_weights_select_text_slots(world, checkpoint, segments):
    weights = np.zeros_like(segments[0].text_weights)
    weights[[2, 5]] = (0.5, 3.0)
    batch = world.collator(checkpoint)([replace(segments[0], text_weights=weights)])
    assert batch.text_weights.tolist() == [0.5, 3.0]
    assert batch.text_targets.tolist() == segments[0].answer_ids[[2, 5]].tolist()


def test_a_segment_without_any_supervision_runs(world, checkpoint, segments):
    silent = replace(
        segments[0],
        text_weights=np.zeros_like(segments[0].text_weights),
        box_tokens=segments[0].box_tokens[:0],
        box_targets=segments[0].box_targets[:0],
    )
    loss, gradient = step_loss(checkpoint, [world.collator(checkpoint)([silent])], [silent])
    assert loss == 0
    assert not gradient.any()


def test_moving_a_batch_keeps_everything(packed):
    moved = packed.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.coord_targets.device.type == "meta"
    assert (moved.n_segments, moved.n_tokens) == (packed.n_segments, packed.n_tokens)
    assert moved.input_ids.shape == packed.input_ids.shape


@settings(max_examples=40)
@given(before=st.integers(1, 9), rows=st.integers(1, 9), columns=st.integers(1, 9), after=st.integers(0, 20))
def test_positions_equal_those_of_the_model(checkpoint, before, rows, columns, after):
    model = checkpoint.model
    merge = model.config.vision_config.spatial_merge_size
    is_image = torch.tensor([[0] * before + [1] * (rows * columns) + [0] * after])
    ids = torch.where(is_image == 1, model.config.image_token_id, 5)
    grid = torch.tensor([[1, rows * merge, columns * merge]])
    expected, _ = model.model.get_rope_index(ids, is_image.int(), image_grid_thw=grid)
    positions = segment_positions(before, rows, columns, after)
    assert positions[1:].tolist() == expected[:, 0].tolist()
    assert positions[0].tolist() == list(range(before + rows * columns + after))
