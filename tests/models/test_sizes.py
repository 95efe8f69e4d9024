"""The published sizes of Qwen3-VL without their weights, and the shrunken model of the family."""

from __future__ import annotations

import pytest

from coordexp.models.expand import round_up
from coordexp.models.sizes import DENSE_SIZES, build_shrunken, qwen3_vl_config, shrunken_config
from helpers import on_meta

# Parameters of the published checkpoints; a tied head counts once.
PUBLISHED = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696}


@pytest.mark.parametrize("size", DENSE_SIZES)
def test_parameter_counts_are_those_of_the_checkpoints(size):
    model = on_meta(qwen3_vl_config(size))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[size]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == DENSE_SIZES[size].tied


@pytest.mark.parametrize("size", DENSE_SIZES)
def test_coordinate_rows_make_the_vocabulary_grow_by_a_multiple_of_128(size):
    """151,669 known tokens and 1000 more do not fit into the published 151,936 rows."""
    model = on_meta(qwen3_vl_config(size))
    model.resize_token_embeddings(round_up(151_669 + 1000), mean_resizing=False)
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 152_704
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == DENSE_SIZES[size].tied


def test_a_shrunken_model_keeps_family_vocabulary_and_patches():
    full = qwen3_vl_config("8b")
    small = shrunken_config(full)
    assert small.text_config.vocab_size == full.text_config.vocab_size
    assert small.vision_config.patch_size == full.vision_config.patch_size
    assert small.tie_word_embeddings is full.tie_word_embeddings is False
    model = build_shrunken(qwen3_vl_config("2b"), seed=1)
    assert sum(p.numel() for p in model.parameters()) < 11_000_000
    assert model.lm_head.weight is model.get_input_embeddings().weight
