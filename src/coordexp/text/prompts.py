"""Prompts: one place for the words, rendered through the tokenizer's own chat template.

A prompt holds one image. `prompt_ids` keeps a single image placeholder; `expand_image` repeats it to the number of
visual tokens of the picture, so that the words are tokenised once for a whole data set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<|image_pad|>"
TASKS: dict[str, str] = {
    "detect": "Detect every object.",
    "name": "Name every object.",
    "count": "How many objects are there?",
}
# Other formats of the `detect` answer (text.codecs.NUMBER_FORMATS), asked for in pretraining the base model only.
FORMAT_TASKS: dict[str, str] = {
    "detect_quoted": "Detect every object. Quote numbers.",
    "detect_tags": "Detect every object. Use tags.",
}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, task: str = "detect") -> NDArray[np.int32]:
    """Token ids of the prompt up to where the answer starts, with one image placeholder."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": (TASKS | FORMAT_TASKS)[task]}]}
    ]
    # transformers' annotation knows messages of plain text only; a list of content parts is its multimodal form.
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)  # type: ignore[arg-type]
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)


def expand_image(ids: NDArray[np.int32], image_token_id: int, n_tokens: int) -> NDArray[np.int32]:
    """Replace the single image placeholder by `n_tokens` of them."""
    (position,) = np.flatnonzero(ids == image_token_id)
    image = np.full(n_tokens, image_token_id, ids.dtype)
    return np.concatenate([ids[:position], image, ids[position + 1 :]])
