"""The coordinate vocabulary: consecutive ids, and refusal of tokenizers in which they are not."""

from __future__ import annotations

import pytest

from coordexp.errors import CheckpointError
from coordexp.geometry.bins import COORD_TOKENS
from coordexp.text.vocabulary import CoordVocabulary, has_coord_tokens

FIRST = 12


class FakeTokenizer:
    """The part of a tokenizer that the vocabulary uses: token -> id."""

    name_or_path = "models/fake"

    def __init__(self, ids: dict[str, int]) -> None:
        self._ids = {"a": 0, "b": 1} | ids

    def get_vocab(self) -> dict[str, int]:
        return self._ids


GOOD = {token: FIRST + k for k, token in enumerate(COORD_TOKENS)}


def without(*tokens: str) -> dict[str, int]:
    return {token: token_id for token, token_id in GOOD.items() if token not in tokens}


def test_ids_and_bins():
    vocabulary = CoordVocabulary.from_tokenizer(FakeTokenizer(GOOD))
    assert vocabulary == CoordVocabulary(FIRST)
    assert vocabulary.end_id == FIRST + 1000
    assert [vocabulary.bin_of(FIRST + k) for k in range(1000)] == list(range(1000))
    assert vocabulary.bin_of(FIRST - 1) is None
    assert vocabulary.bin_of(FIRST + 1000) is None


def test_a_tokenizer_that_lists_its_tokens_in_another_order_is_fine():
    assert CoordVocabulary.from_tokenizer(FakeTokenizer(dict(reversed(GOOD.items())))) == CoordVocabulary(FIRST)


BROKEN = {
    "none": ({}, r"1000 of 1000 .* \(first: <\|coord_0\|>\)"),
    "one missing": (without("<|coord_500|>"), r"1 of 1000 .* \(first: <\|coord_500\|>\)"),
    "first and last missing": (without("<|coord_0|>", "<|coord_999|>"), "2 of 1000"),
    "two with one id": (GOOD | {"<|coord_7|>": GOOD["<|coord_6|>"]}, "not consecutive"),
    "two swapped": (GOOD | {"<|coord_6|>": FIRST + 7, "<|coord_7|>": FIRST + 6}, "not consecutive"),
    "sorted as text": ({token: FIRST + k for k, token in enumerate(sorted(COORD_TOKENS))}, "not consecutive"),
    "falling": ({token: FIRST + 999 - k for k, token in enumerate(COORD_TOKENS)}, "not consecutive"),
    "a hole": ({token: k + (k >= 300) + FIRST for k, token in enumerate(COORD_TOKENS)}, "not consecutive"),
}


@pytest.mark.parametrize(("ids", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_inconsistent_vocabularies_are_refused(ids, message):
    with pytest.raises(CheckpointError, match=f"models/fake.*{message}"):
        CoordVocabulary.from_tokenizer(FakeTokenizer(ids))


def test_presence_is_determined_by_the_first_token():
    assert has_coord_tokens(FakeTokenizer(GOOD))
    assert not has_coord_tokens(FakeTokenizer({}))
