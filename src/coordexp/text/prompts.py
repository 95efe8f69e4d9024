"""Prompts: all wordings in one module, rendered with the tokenizer's own chat template.

A prompt contains one image. `prompt_ids` has a single image placeholder, which a sample repeats once per visual token
of its image (`packing/samples.py:Sample`), so that the text is tokenized once for a whole data set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from coordexp.errors import DataError

IMAGE_TOKEN = "<|image_pad|>"
TASKS: dict[str, str] = {
    "detect": "Detect every object.",
    "name": "Name every object.",
    "count": "How many objects are there?",
    "nouns": "Detect every object. Nouns only.",
    "colors": "Detect every object. Colors only.",
}
# Other answer formats (text.codecs.NUMBER_FORMATS), which are used only to pretrain the embedded base model.
FORMAT_SUFFIXES: dict[str, str] = {"detect": "", "detect_quoted": " Quote numbers.", "detect_tags": " Use tags."}
# Wordings of the prompts that records specify in `metadata.prompt`; dev and val use the first of each. `closed` lists
# all category names of a data set, `listed` some of them, present in the image or not.
WORDINGS: dict[str, tuple[str, ...]] = {
    "open": (
        TASKS["detect"],
        "Find every object in the image.",
        "List all objects with their boxes.",
        "Locate everything that you can name.",
    ),
    "closed": (
        "Detect every object of these classes: {names}.",
        "Find all instances of the following: {names}.",
        "List every object that is one of: {names}.",
        "Locate all of these, where they appear: {names}.",
    ),
    "phrase": (
        "Detect what this phrase refers to: {names}",
        "Find the object described as: {names}",
        "Which object is meant? {names}",
        "Locate: {names}",
    ),
}
WORDINGS["listed"] = WORDINGS["closed"]
_PLACE = "coordexp question"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, task: str = "detect") -> NDArray[np.int32]:
    """Token ids of the prompt up to the start of the answer, with one image placeholder."""
    text = _rendered(tokenizer, TASKS.get(task) or TASKS["detect"] + FORMAT_SUFFIXES[task])
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)


def _rendered(tokenizer: PreTrainedTokenizerBase, words: str) -> str:
    """One user turn with an image and text, and the opening of the answer, in the tokenizer's own chat template."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def question(prompt: dict[str, Any]) -> str:
    """The text of a record's `metadata.prompt`: {"kind", "style" (index of the wording), "names" (if it lists any)}.

    Raises:
        DataError: the kind is unknown, or a prompt that must list names has none.
    """
    kind, names = prompt.get("kind"), prompt.get("names", [])
    if kind not in WORDINGS:
        raise DataError(f"metadata.prompt.kind is {kind!r}; expected one of {', '.join(sorted(WORDINGS))}.")
    if kind != "open" and not names:
        raise DataError(f"metadata.prompt of kind {kind} has no names; expected at least one.")
    wordings = WORDINGS[kind]
    return wordings[prompt.get("style", 0) % len(wordings)].format(names=", ".join(names))


def asked_names(prompt: dict[str, Any] | None) -> frozenset[str] | None:
    """The category names that an answer may contain; None if the prompt asks for all objects."""
    return None if prompt is None or prompt["kind"] == "open" else frozenset(prompt["names"])


def question_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int32]:
    """As `prompt_ids`, for any text. The text is data: a chat marker or coordinate token in it is split into text.

    The text is between two special tokens, so encoding it separately changes no other token.
    """
    before, after = _around(tokenizer)
    ids = [*before, *tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), *after]
    return np.array(ids, np.int32)


def question_text(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int32]) -> str:
    """The text of a prompt from `prompt_ids` or `question_ids`, for a server that renders the prompt itself."""
    before, after = _around(tokenizer)
    words = ids.tolist()[len(before) : len(ids) - len(after)]
    return str(tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a prompt before and after its text."""
    before, after = _rendered(tokenizer, _PLACE).split(_PLACE)
    return tokenizer.encode(before, add_special_tokens=False), tokenizer.encode(after, add_special_tokens=False)
