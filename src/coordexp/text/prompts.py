"""Prompts: one place for the words, rendered through the tokenizer's own chat template.

A prompt holds one image. `prompt_ids` keeps a single image placeholder, which a sample repeats to the number of visual
tokens of the picture (`packing/samples.py:Sample`), so that the words are tokenised once for a whole data set.
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
# Other formats of an answer of detection (text.codecs.NUMBER_FORMATS), asked for in pretraining the base model only.
FORMAT_SUFFIXES: dict[str, str] = {"detect": "", "detect_quoted": " Quote numbers.", "detect_tags": " Use tags."}
# Wordings of the questions that records carry in `metadata.prompt`; the first of each is that of dev and val. `closed`
# gives a data set's whole list of names, `listed` some of them, present or not.
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
    """Token ids of the prompt up to where the answer starts, with one image placeholder."""
    text = _rendered(tokenizer, TASKS.get(task) or TASKS["detect"] + FORMAT_SUFFIXES[task])
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)


def _rendered(tokenizer: PreTrainedTokenizerBase, words: str) -> str:
    """One user turn with an image and words, and the opening of the answer, by the tokenizer's own template."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def question(prompt: dict[str, Any]) -> str:
    """The words of a record's `metadata.prompt`: {"kind", "style" (number of the wording), "names" (where it has any)}.

    Raises:
        DataError: the kind is unknown, or a question about names has none.
    """
    kind, names = prompt.get("kind"), prompt.get("names", [])
    if kind not in WORDINGS:
        raise DataError(f"metadata.prompt.kind is {kind!r}; expected one of {', '.join(sorted(WORDINGS))}.")
    if kind != "open" and not names:
        raise DataError(f"metadata.prompt of kind {kind} has no names; expected at least one.")
    wordings = WORDINGS[kind]
    return wordings[prompt.get("style", 0) % len(wordings)].format(names=", ".join(names))


def asked_names(prompt: dict[str, Any] | None) -> frozenset[str] | None:
    """The names that an answer may hold, or None where everything is asked for."""
    return None if prompt is None or prompt["kind"] == "open" else frozenset(prompt["names"])


def question_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int32]:
    """As `prompt_ids`, for any words. They are data: a chat marker or coordinate token inside is spelled out.

    The words stand between two special tokens, so encoding them on their own changes no other token.
    """
    before, after = _around(tokenizer)
    ids = [*before, *tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), *after]
    return np.array(ids, np.int32)


def question_text(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int32]) -> str:
    """The words of a prompt that `prompt_ids` or `question_ids` made, for a server that renders them itself."""
    before, after = _around(tokenizer)
    words = ids.tolist()[len(before) : len(ids) - len(after)]
    return str(tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a prompt before its words and after them."""
    before, after = _rendered(tokenizer, _PLACE).split(_PLACE)
    return tokenizer.encode(before, add_special_tokens=False), tokenizer.encode(after, add_special_tokens=False)
