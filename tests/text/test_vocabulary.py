"""The coordinate vocabulary: consecutive ids, and refusal of tokenizers in which they are not."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from coordexp.errors import CheckpointError
from coordexp.geometry.bins import COORD_TOKENS
from coordexp.text.vocabulary import CoordVocabulary, has_coord_tokens, known_id

FIRST = 12


def tokenizer_of(ids: dict[str, int], unk_token: str | None = None) -> PreTrainedTokenizerFast:
    """Tokens `a` and `b`, and these."""
    words = WordLevel({"a": 0, "b": 1} | ids, unk_token=unk_token or "a")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token=unk_token, name_or_path="models/words")


GOOD = {token: FIRST + k for k, token in enumerate(COORD_TOKENS)}


def without(*tokens: str) -> dict[str, int]:
    return {token: token_id for token, token_id in GOOD.items() if token not in tokens}


def test_ids_and_bins():
    vocabulary = CoordVocabulary.from_tokenizer(tokenizer_of(GOOD))
    assert vocabulary == CoordVocabulary(FIRST)
    assert vocabulary.end_id == FIRST + 1000
    assert [vocabulary.bin_of(FIRST + k) for k in range(1000)] == list(range(1000))
    assert vocabulary.bin_of(FIRST - 1) is None
    assert vocabulary.bin_of(FIRST + 1000) is None


def test_a_tokenizer_that_lists_its_tokens_in_another_order_is_fine():
    assert CoordVocabulary.from_tokenizer(tokenizer_of(dict(reversed(GOOD.items())))) == CoordVocabulary(FIRST)


BROKEN = {
    "none": ({}, r"1000 of 1000 .* \(first: <\|coord_0\|>\)"),
    "one missing": (without("<|coord_500|>"), r"1 of 1000 .* \(first: <\|coord_500\|>\)"),
    "first and last missing": (without("<|coord_0|>", "<|coord_999|>"), "2 of 1000"),
    "two with one id": (GOOD | {"<|coord_7|>": GOOD["<|coord_6|>"]}, "1 of 1000"),
    "two swapped": (GOOD | {"<|coord_6|>": FIRST + 7, "<|coord_7|>": FIRST + 6}, "not consecutive"),
    "sorted as text": ({token: FIRST + k for k, token in enumerate(sorted(COORD_TOKENS))}, "not consecutive"),
    "falling": ({token: FIRST + 999 - k for k, token in enumerate(COORD_TOKENS)}, "not consecutive"),
    "a hole": ({token: k + (k >= 300) + FIRST for k, token in enumerate(COORD_TOKENS)}, "not consecutive"),
}


@pytest.mark.parametrize(("ids", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_inconsistent_vocabularies_are_refused(ids, message):
    with pytest.raises(CheckpointError, match=f"models/words.*{message}"):
        CoordVocabulary.from_tokenizer(tokenizer_of(ids))


def test_presence_is_determined_by_the_first_token():
    assert has_coord_tokens(tokenizer_of(GOOD))
    assert not has_coord_tokens(tokenizer_of({}))


@pytest.mark.parametrize("unk_token", [None, "b"])
def test_the_id_of_a_token_is_that_of_the_vocabulary(unk_token):
    tokenizer = tokenizer_of(GOOD, unk_token)
    known = tokenizer.get_vocab()
    assert {token: known_id(tokenizer, token) for token in known} == known
    assert known_id(tokenizer, "c") is None
