"""From the bytes of a chat completion to a generation; everything that a server sends is checked before use."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordexp.infra.printable import excerpt
from coordexp.rollout.engine import Generation, is_token_ids
from coordexp.rollout.vllm_http import ServerFault


@dataclass(frozen=True, slots=True)
class Expected:
    """What a valid answer must match: model name, prompt tokens, range of ids and token budget.

    `end_id` ends an answer; `image_id`, the placeholder for visual input, must not occur in it.
    """

    model: str
    prompt_ids: Sequence[int]
    vocabulary_size: int
    max_new_tokens: int
    end_id: int
    image_id: int


def read_completion(body: bytes, expected: Expected) -> Generation:
    """The generation in a reply.

    Raises:
        ServerFault: the reply is not the requested chat completion; the message names the difference.
    """
    completion = _json_object(body)
    choices = completion.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ServerFault(f"a reply without exactly one item in 'choices': {excerpt(body)}")
    if completion.get("model") != expected.model:
        said = excerpt(reprlib.repr(completion.get("model")))
        raise ServerFault(f"an answer of the model {said}, expected {expected.model}")
    choice = choices[0]
    prompt_ids = completion.get("prompt_token_ids")
    if not is_token_ids(prompt_ids):
        raise ServerFault(
            f"'prompt_token_ids' is {excerpt(reprlib.repr(prompt_ids))}, expected token ids; the server must support "
            "return_token_ids"
        )
    if prompt_ids != list(expected.prompt_ids):
        raise ServerFault(
            f"the server's prompt differs from ours at {_first_difference(expected.prompt_ids, prompt_ids)}; expected "
            "the same chat template and image size: serve the checkpoint's own folder with its own processor files"
        )
    return _generation(choice.get("token_ids"), choice.get("finish_reason"), expected)


def _json_object(body: bytes) -> dict[str, Any]:
    if not body:
        raise ServerFault("an empty reply")
    try:
        value = json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise ServerFault(f"a reply that is not UTF-8: {excerpt(body)}") from error
    except ValueError as error:
        raise ServerFault(f"a reply that is not JSON ({error}): {excerpt(body)}") from error
    except RecursionError as error:
        raise ServerFault(f"a reply nested too deeply: {excerpt(body)}") from error
    if not isinstance(value, dict):
        raise ServerFault(f"a reply that is not a JSON object: {excerpt(body)}")
    return value


def _generation(token_ids: Any, reason: Any, expected: Expected) -> Generation:
    try:
        found = Generation.from_json(token_ids, reason, expected.vocabulary_size)
    except ValueError as error:
        raise ServerFault(f"an invalid answer: {excerpt(str(error))}") from error
    if not 0 < len(found.ids) <= expected.max_new_tokens:
        raise ServerFault(f"{len(found.ids)} tokens, expected 1 to {expected.max_new_tokens}")
    if expected.image_id in found.ids:
        raise ServerFault(f"an answer with the id {expected.image_id}, the placeholder for an image")
    ends = np.flatnonzero(found.ids == expected.end_id)
    if len(ends):
        return Generation(found.ids[: ends[0] + 1], "stop")
    if reason == "length" and len(found.ids) < expected.max_new_tokens:
        raise ServerFault(f"an answer truncated after {len(found.ids)} tokens, expected {expected.max_new_tokens}")
    return Generation(found.ids, "length")


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    for i, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if own != other:
            return f"token {i} (ours {own}, theirs {reprlib.repr(other)})"
    return f"its length (ours {len(ours)} tokens, theirs {len(theirs)})"
