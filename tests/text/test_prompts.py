"""Prompts: the chat layout, one image placeholder, and its expansion."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import new_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from coordexp.text.prompts import IMAGE_TOKEN, TASKS, expand_image, prompt_ids

TOKENIZER = new_tokenizer()
IMAGE_ID = TOKENIZER.convert_tokens_to_ids(IMAGE_TOKEN)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_one_user_turn_with_one_image(task):
    ids = prompt_ids(TOKENIZER, task)
    assert ids.dtype == np.int32
    assert (ids == IMAGE_ID).sum() == 1
    assert TOKENIZER.decode(ids.tolist()) == (
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{TASKS[task]}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_default_task_is_detection():
    assert prompt_ids(TOKENIZER).tolist() == prompt_ids(TOKENIZER, "detect").tolist()


def test_markers_are_single_tokens():
    ids = prompt_ids(TOKENIZER).tolist()
    for marker in ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"):
        assert TOKENIZER.convert_tokens_to_ids(marker) in ids


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.integers(1, 20))
def test_expansion_repeats_the_placeholder_and_nothing_else(before, after, n):
    ids = np.array([*before, 77, *after], np.int32)
    expanded = expand_image(ids, 77, n)
    assert expanded.tolist() == [*before, *[77] * n, *after]
    assert expanded.dtype == np.int32


@pytest.mark.parametrize("ids", [[1, 2, 3], [77, 1, 77]], ids=["none", "two"])
def test_a_prompt_without_exactly_one_image_is_an_error(ids):
    with pytest.raises(ValueError, match="unpack"):
        expand_image(np.array(ids, np.int32), 77, 4)
