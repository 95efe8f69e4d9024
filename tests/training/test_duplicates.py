"""Duplicates in a rollout, and the token at which each diverges from the answer without it, in both codecs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordexp.rollout.records import Rollout
from coordexp.text.codecs import AnswerEncoder, TextObject, get_codec
from coordexp.training.channel_b import channel_b_segments
from coordexp.training.duplicates import divergence_positions, duplicate_ranks
from helpers import PARAMS, changed, new_checkpoint, rollout_of, sample_of

CAT, DOG = TextObject("cat", (100, 100, 300, 300)), TextObject("dog", (500, 110, 800, 400))
NEAR_CAT, FAR_CAT = TextObject("cat", (101, 100, 300, 300)), TextObject("cat", (600, 600, 900, 900))
TWO = changed(PARAMS.stage2, passes="two", missed="append", eos_weight=1.0, duplicate_unlikelihood_weight=0.5)
CODECS = ("json", "tags")


@pytest.fixture(scope="module")
def checkpoint():
    return new_checkpoint()


def rolled_out(checkpoint, objects, codec="json") -> Rollout:
    return rollout_of(checkpoint, sample_of(checkpoint, codec), objects, codec)


def unlikely(checkpoint, objects, codec: str, params=TWO) -> list[str]:
    """The tokens with an unlikelihood loss in channel B, each with the preceding text."""
    sample = sample_of(checkpoint, codec)
    encoder = AnswerEncoder(checkpoint.tokenizer, get_codec(codec))
    segment = channel_b_segments(sample, rolled_out(checkpoint, objects, codec), encoder, params)[0]
    return [checkpoint.tokenizer.decode(segment.answer_ids[: p + 1]) for p in segment.unlikely_tokens]


def test_a_duplicate_repeats_name_and_box_and_is_unmatched(checkpoint):
    assert duplicate_ranks(rolled_out(checkpoint, (CAT, DOG, NEAR_CAT))) == [2]
    assert duplicate_ranks(rolled_out(checkpoint, (CAT, FAR_CAT))) == []  # another place
    assert duplicate_ranks(rolled_out(checkpoint, (CAT, replace(CAT, desc="dog")))) == []  # another name
    twice = rolled_out(checkpoint, (FAR_CAT, FAR_CAT, FAR_CAT))
    assert duplicate_ranks(twice) == [1, 2]
    assert duplicate_ranks(replace(twice, pairs=((1, 0),))) == [2]  # annotated twice at one place


@pytest.mark.parametrize("codec", CODECS)
def test_the_first_diverging_token_is_in_the_name_if_another_name_follows(checkpoint, codec):
    (found,) = unlikely(checkpoint, (CAT, NEAR_CAT, DOG), codec)
    assert found.endswith("cat")
    assert found.count("cat") == 2


@pytest.mark.parametrize("codec", CODECS)
def test_the_first_diverging_token_is_a_coordinate_if_the_same_name_follows(checkpoint, codec):
    (found,) = unlikely(checkpoint, (CAT, NEAR_CAT, FAR_CAT), codec)
    assert found.endswith("<|coord_101|>")


@pytest.mark.parametrize("codec", CODECS)
def test_the_first_diverging_token_continues_the_list_if_nothing_follows(checkpoint, codec):
    (found,) = unlikely(checkpoint, (CAT, DOG, NEAR_CAT), codec)
    assert found.endswith('"]}, {"desc": "' if codec == "json" else "<|box_end|><|object_ref_start|>")


@pytest.mark.parametrize("codec", CODECS)
def test_a_run_of_duplicates_is_compared_with_what_comes_after_it(checkpoint, codec):
    found = unlikely(checkpoint, (CAT, NEAR_CAT, CAT, DOG), codec)
    assert [text.count("cat") for text in found] == [2, 3]
    assert all(text.endswith("cat") for text in found)


@pytest.mark.parametrize("codec", CODECS)
def test_one_pass_marks_them_in_its_own_target(checkpoint, codec):
    (found,) = unlikely(checkpoint, (DOG, CAT, NEAR_CAT), codec, changed(TWO, passes="one"))
    assert found.endswith("cat")  # the missed cup follows
    assert unlikely(checkpoint, (DOG, CAT, NEAR_CAT), codec, changed(TWO, passes="one", extras="drop")) == []


def test_duplicates_are_marked_only_with_a_weight(checkpoint):
    assert unlikely(checkpoint, (CAT, NEAR_CAT, DOG), "json", changed(TWO, duplicate_unlikelihood_weight=0.0)) == []


def test_positions_after_noncanonical_tokens_are_not_marked(checkpoint):
    """Its positions would point at tokens that are not the duplicate's."""
    sample, encoder = sample_of(checkpoint, "json"), AnswerEncoder(checkpoint.tokenizer, get_codec("json"))
    rollout = rolled_out(checkpoint, (CAT, NEAR_CAT, DOG))
    moved = replace(rollout, ids=(*rollout.ids[:3], rollout.ids[2], *rollout.ids[3:]))
    segment = channel_b_segments(sample, moved, encoder, TWO)[0]
    assert segment.unlikely_tokens.tolist() == []


def test_tokens_that_agree_throughout_have_no_divergence(checkpoint):
    encoder = AnswerEncoder(checkpoint.tokenizer, get_codec("tags"))
    answer = encoder.encode([CAT, CAT, CAT])
    assert divergence_positions(answer, {1}).tolist() == []
    np.testing.assert_array_equal(divergence_positions(answer, set()), np.empty(0, np.int64))
