"""Position ids equal those that Qwen3-VL computes itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.packing.collator import segment_positions
from helpers import new_checkpoint


@pytest.fixture(scope="module")
def model():
    return new_checkpoint().model


@settings(max_examples=40)
@given(before=st.integers(1, 9), rows=st.integers(1, 9), columns=st.integers(1, 9), after=st.integers(0, 20))
def test_positions_equal_those_of_the_model(model, before, rows, columns, after):
    merge = model.config.vision_config.spatial_merge_size
    is_image = torch.tensor([[0] * before + [1] * (rows * columns) + [0] * after])
    ids = torch.where(is_image == 1, model.config.image_token_id, 5)
    grid = torch.tensor([[1, rows * merge, columns * merge]])
    expected, _ = model.model.get_rope_index(ids, is_image.int(), image_grid_thw=grid)
    positions = segment_positions(before, rows, columns, after)
    assert positions[1:].tolist() == expected[:, 0].tolist()
    assert positions[0].tolist() == list(range(before + rows * columns + after))


def test_by_hand():
    # two words, an image of 2 rows and 3 columns, two words
    assert segment_positions(2, 2, 3, 2).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert segment_positions(2, 2, 3, 2).dtype == np.int64
