"""From token ids to symbols: compared with the tokenizer's decoding, and the map from characters to tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from coordexp.errors import CheckpointError
from coordexp.geometry.bins import COORD_TOKENS
from coordexp.text.symbols import (
    BOX_START,
    END,
    FIRST_COORD,
    MARKERS,
    OTHER,
    REF_START,
    TokenTable,
)
from coordexp.text.vocabulary import CoordVocabulary

SPECIAL = [*MARKERS, "<|image_pad|>", *COORD_TOKENS]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def train_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["a black cat, größer 猫", '{"objects": [{"desc": "cat"}]}'] * 4, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken('", "bbox_2d": ["', normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core)


TOKENIZER = train_tokenizer()
COORD = CoordVocabulary.from_tokenizer(TOKENIZER)
TABLE = TokenTable.from_tokenizer(TOKENIZER, COORD)
N_TEXT_IDS = TOKENIZER.convert_tokens_to_ids(SPECIAL[0])


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def id_of(token: str) -> int:
    return TOKENIZER.convert_tokens_to_ids(token)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=40))
def test_text_is_recovered_exactly(text):
    """This includes text that spells a special token, as a description may do."""
    symbols = TABLE.symbols(TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True))
    assert symbols.text == text
    assert len(symbols.token_of) == len(symbols.text)


def test_special_tokens_become_one_reserved_character():
    ids = encode("<|object_ref_start|>cat<|box_start|><|coord_0|><|coord_999|><|image_pad|><|im_end|>")
    expected = f"{REF_START}cat{BOX_START}{chr(FIRST_COORD)}{chr(FIRST_COORD + 999)}{OTHER}{END}"
    assert TABLE.symbols(ids).text == expected


def test_added_tokens_that_are_not_special_are_text():
    assert TABLE.symbols([id_of('", "bbox_2d": ["')]).text == '", "bbox_2d": ["'


def test_spelled_coordinates_stay_text():
    ids = TOKENIZER.encode("<|coord_5|>", add_special_tokens=False, split_special_tokens=True)
    assert len(ids) > 1
    assert TABLE.symbols(ids).text == "<|coord_5|>"


def test_private_use_characters_in_text_cannot_imitate_tokens():
    ids = encode("a\ue005b\uf8ffc")
    assert TABLE.symbols(ids).text == f"a{REPLACEMENT}b{REPLACEMENT}c"


@pytest.mark.parametrize("unknown", [-1, len(TOKENIZER), 10**9])
def test_unknown_ids_become_a_reserved_character(unknown):
    assert TABLE.symbols([*encode("a"), unknown, *encode("b")]).text == f"a{OTHER}b"


def test_without_a_coordinate_vocabulary_they_are_ordinary_special_tokens():
    table = TokenTable.from_tokenizer(TOKENIZER, None)
    assert table.symbols([COORD.first_id + 7]).text == OTHER


def test_an_empty_answer_has_no_symbols():
    symbols = TABLE.symbols([])
    assert symbols.text == ""
    assert symbols.token_of == []


@pytest.mark.parametrize("seed", range(20))
def test_broken_utf8_decodes_like_python_run_by_run(seed):
    """Random text ids give broken UTF-8. Each run between special tokens must decode as errors='replace' would."""
    rng = random.Random(seed)
    runs = [[rng.randrange(N_TEXT_IDS) for _ in range(rng.randrange(12))] for _ in range(6)]
    marker = COORD.first_id + 3
    ids = [token for run in runs for token in [*run, marker]]
    expected = [b"".join(TABLE.pieces[i] for i in run).decode("utf-8", "replace") for run in runs]
    symbols = TABLE.symbols(ids)
    assert symbols.text.split(chr(FIRST_COORD + 3))[:-1] == [
        "".join(REPLACEMENT if "\ue000" <= char <= "\uf8ff" else char for char in text) for text in expected
    ]
    markers = [i for i, char in enumerate(symbols.text) if char == chr(FIRST_COORD + 3)]
    assert [symbols.token_of[i] for i in markers] == [i for i, token in enumerate(ids) if token == marker]


def test_a_character_belongs_to_the_token_of_its_first_byte():
    table = TokenTable.build([bytes([byte]) for byte in range(256)])
    text = "aé猫🐈z"
    symbols = table.symbols(list(text.encode()))
    assert symbols.text == text
    assert symbols.token_of == [0, 1, 3, 6, 10]
    assert symbols.token_span(1, 3) == (1, 4)


def test_an_incomplete_character_is_one_replacement():
    table = TokenTable.build([bytes([byte]) for byte in range(256)])
    symbols = table.symbols([*"a🐈".encode()[:-1], ord("b")])
    assert symbols.text == f"a{REPLACEMENT}b"
    assert symbols.token_of == [0, 1, 4]


def test_one_token_may_hold_many_characters_and_ids_may_be_numpy():
    table = TokenTable.build([b"abc", b"", b"de"])
    symbols = table.symbols(np.array([0, 1, 2], dtype=np.int32))
    assert symbols.text == "abcde"
    assert symbols.token_of == [0, 0, 0, 2, 2]


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    core = Tokenizer(models.WordLevel({"▁cat": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(CheckpointError, match="byte-level"):
        TokenTable.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core), None)
