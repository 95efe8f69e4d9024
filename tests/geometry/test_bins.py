"""The bin codec: rounding rule, round-trip error, and written form of a bin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.geometry.bins import (
    COORD_PATTERN,
    COORD_TOKENS,
    MAX_BIN,
    NUM_BINS,
    box_scale,
    decode_boxes,
    decode_norm,
    encode_boxes,
    encode_norm,
    target_bins,
)

HALF_BIN = 0.5 / NUM_BINS
sides = st.integers(1, 4096)


@pytest.mark.parametrize(
    ("coordinate", "expected"),
    [(0.0, 0), (0.0004, 0), (0.0006, 1), (0.1102, 110), (0.5, 500), (0.9994, 999), (0.9996, 999), (1.0, 999)],
)
def test_encode_rounds_to_the_nearest_bin_and_clamps(coordinate, expected):
    assert encode_norm([coordinate]).tolist() == [expected]


def test_encode_clamps_coordinates_outside_the_image():
    assert encode_norm([-0.2, -1e-9, 1.0001, 7.0]).tolist() == [0, 0, MAX_BIN, MAX_BIN]


def test_decode_then_encode_returns_every_bin():
    bins = np.arange(NUM_BINS)
    assert encode_norm(decode_norm(bins)).tolist() == bins.tolist()
    assert decode_norm([0, 500, 999]).tolist() == [0.0, 0.5, 0.999]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_round_trip_error_is_half_a_bin_and_one_bin_at_the_far_edge(coordinates):
    c = np.array(coordinates)
    error = np.abs(decode_norm(encode_norm(c)) - c)
    is_last_half_bin = c > (MAX_BIN + 0.5) / NUM_BINS
    assert (error[~is_last_half_bin] <= HALF_BIN + 1e-12).all()
    assert (error[is_last_half_bin] <= 2 * HALF_BIN + 1e-12).all()


@given(st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_encode_keeps_order(pair):
    low, high = sorted(pair)
    first, second = encode_norm([low, high])
    assert first <= second


@given(sides, sides, st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=5))
def test_pixel_boxes_are_scaled_by_width_and_height(width, height, normalised):
    boxes_px = np.array(normalised) * [width, height, width, height]
    bins = encode_boxes(boxes_px, width, height)
    error_px = np.abs(decode_boxes(bins, width, height) - boxes_px)
    bin_px = box_scale(width, height) / NUM_BINS
    is_last_half_bin = boxes_px > (MAX_BIN + 0.5) * bin_px
    assert bins.shape == boxes_px.shape
    assert (error_px <= np.where(is_last_half_bin, bin_px, bin_px / 2) + 1e-9).all()


def test_width_scales_x_and_height_scales_y():
    assert encode_boxes([[64, 48, 320, 240]], 640, 480).tolist() == [[100, 100, 500, 500]]
    assert decode_boxes([110, 310, 410, 705], 640, 480).tolist() == pytest.approx([70.4, 148.8, 262.4, 338.4])


def test_decoding_never_rounds_to_whole_pixels():
    assert decode_boxes([1, 1, 2, 3], 333, 77).tolist() == pytest.approx([0.333, 0.077, 0.666, 0.231])


def test_rounding_has_no_bias_up_and_left():
    coordinates = np.random.default_rng(0).uniform(0, 0.999, 200_000)
    bias_bins = (decode_norm(encode_norm(coordinates)) - coordinates).mean() * NUM_BINS
    assert abs(bias_bins) < 0.005  # flooring would give -0.5


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=5))
def test_target_bins_are_the_unrounded_bins(normalised):
    boxes_px = np.array(normalised) * [640, 480, 640, 480]
    targets = target_bins(boxes_px, 640, 480)
    assert targets.max() <= MAX_BIN
    assert np.abs(targets - encode_boxes(boxes_px, 640, 480)).max() <= 0.5 + 1e-9


def test_target_bins_keep_the_fraction():
    assert target_bins([[0.32, 0, 320.32, 480]], 640, 480).tolist() == [pytest.approx([0.5, 0, 500.5, 999])]


def test_only_written_forms_of_bins_match_the_pattern():
    assert [int(COORD_PATTERN.fullmatch(token)[1]) for token in COORD_TOKENS] == list(range(NUM_BINS))
    for wrong in ("<|coord_1000|>", "<|coord_01|>", "<|coord_-1|>", "<|coord_|>", "<|coord_1|> ", "<|coord_1\u0663|>"):
        assert COORD_PATTERN.fullmatch(wrong) is None, wrong
