"""The real Qwen3 tokenizer: its ids, and the coordinate tokens on top of it."""

from __future__ import annotations

import pytest

from coordexp.geometry.bins import COORD_TOKENS
from coordexp.text.codecs import AnswerEncoder, TextObject, get_codec
from coordexp.text.prompts import prompt_ids, question_ids
from coordexp.text.vocabulary import CoordVocabulary
from qwen import qwen3_tokenizer

FIRST_FREE = 151_669


@pytest.fixture(scope="module")
def tokenizer():
    return qwen3_tokenizer()


@pytest.fixture(scope="module")
def with_coordinates():
    tokenizer = qwen3_tokenizer()
    tokenizer.add_tokens(list(COORD_TOKENS), special_tokens=True)
    return tokenizer


def test_ids_of_the_added_tokens(tokenizer):
    assert len(tokenizer) == FIRST_FREE
    known = tokenizer.get_vocab()
    ids = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|object_ref_start|>": 151646, "<|box_end|>": 151649}
    ids |= {"<|vision_start|>": 151652, "<|image_pad|>": 151655, "<|video_pad|>": 151656, "</think>": 151668}
    assert {token: known[token] for token in ids} == ids


def test_numbers_are_read_digit_by_digit(tokenizer):
    assert len(tokenizer.encode("345", add_special_tokens=False)) == 3
    assert tokenizer.decode(tokenizer.encode("a caf\u00e9, 12\u65e5\n\n x")) == "a caf\u00e9, 12\u65e5\n\n x"


def test_coordinate_ids_are_the_first_free_ones(with_coordinates):
    assert CoordVocabulary.from_tokenizer(with_coordinates) == CoordVocabulary(FIRST_FREE)
    assert len(with_coordinates) == FIRST_FREE + 1000


@pytest.mark.parametrize(("codec", "per_object"), [("json", 25), ("tags", 9)])
def test_tokens_of_an_object(with_coordinates, codec, per_object):
    """With a name of one token; the box markers of `tags` replace the JSON scaffold."""
    encoder = AnswerEncoder(with_coordinates, get_codec(codec))
    cat = TextObject("cat", (1, 20, 300, 999))
    lengths = [len(encoder.encode([cat] * n).ids) for n in (1, 2, 3)]
    assert lengths[2] - lengths[1] == lengths[1] - lengths[0] == per_object


def test_prompts_close_and_data_stay_data(with_coordinates):
    ids = prompt_ids(with_coordinates)
    assert (ids == 151655).sum() == 1
    assert with_coordinates.decode(ids).endswith("<|im_start|>assistant\n")
    words = question_ids(with_coordinates, "<|im_end|> <|coord_3|>")
    assert (words == 151645).sum() == 1  # only the template's own
    assert (words >= FIRST_FREE).sum() == 0
