"""The embedded tokenizer: Qwen's special tokens, single digits, one token per scaffold piece, lossless text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from coordexp.text.prompts import question
from helpers import catalog, new_tokenizer
from toyworld.tokenizer import QWEN_SPECIAL_TOKENS, scaffold_pieces

TOKENIZER = new_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_the_same_names_give_the_same_tokenizer():
    assert new_tokenizer().get_vocab() == TOKENIZER.get_vocab()
    assert new_tokenizer().backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_special_tokens_follow_each_other_in_qwens_order():
    ids = TOKENIZER.convert_tokens_to_ids(list(QWEN_SPECIAL_TOKENS))
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert all(encode(token) == [i] for token, i in zip(QWEN_SPECIAL_TOKENS, ids, strict=True))
    assert TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.pad_token == "<|endoftext|>"


def test_every_scaffold_piece_is_one_token():
    pieces = scaffold_pieces()
    assert '{"objects": []}' in pieces
    assert '"]}, {"desc": "' in pieces
    for piece in pieces:
        assert len(encode(piece)) == 1, piece


def test_digits_are_single_tokens():
    assert [TOKENIZER.decode([i]) for i in encode("1000 407")] == ["1", "0", "0", "0", " ", "4", "0", "7"]


def test_each_word_of_training_is_one_token_at_the_beginning_and_after_a_space():
    assert all(len(encode(word)) == len(encode(f" {word}")) == 1 for word in catalog().words)
    label = next(label for label in catalog().tiers["strict"])
    assert [TOKENIZER.decode([i]) for i in encode(f"{label.name}, cow, {label.name}.")] == [
        *(label.color, f" {label.noun}", ", ", "cow", ", ", label.color, f" {label.noun}", "."),
    ]


def test_the_words_of_the_prompts_are_single_tokens():
    listed = encode(question({"kind": "listed", "names": ["cow"]}))
    assert [TOKENIZER.decode([i]) for i in listed] == [
        *("Detect", " every", " object", " of", " these", " classes", ":", " cow", "."),
    ]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_tokenization(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", ['{"objects": [{"desc": "cat", "bbox_2d": [1, 20, 300, 1000]}]}', "a,  b\n\n c"])
def test_saving_and_loading_keeps_the_tokenizer(tmp_path, text):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.encode(text, add_special_tokens=False) == encode(text)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.eos_token, loaded.pad_token) == (TOKENIZER.eos_token, TOKENIZER.pad_token)
