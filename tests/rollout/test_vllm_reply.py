"""Every reply of a server is either the correct answer or a fault with a reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from coordexp.rollout.vllm_http import ServerFault
from coordexp.rollout.vllm_reply import Expected, read_completion

END = 9
IMAGE = 18
EXPECTED = Expected(
    model="coordexp-0", prompt_ids=[5, 6, 7], vocabulary_size=20, max_new_tokens=4, end_id=END, image_id=IMAGE
)
# As vLLM sends it; what is not read may be anything.
GOOD = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "coordexp-0",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a\u00e9<|im_end|>", "tool_calls": []},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": END,
            "token_ids": [1, 2, END],
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 3},
    "prompt_token_ids": [5, 6, 7],
}
OTHER_VALUES = [
    None,
    True,
    False,
    -1,
    0.5,
    5.0,
    20,
    2**31,
    2**63,
    10**30,
    "",
    "5",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    "stop",
]


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all values inside a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutations() -> Iterator[bytes]:
    """The good reply with a value replaced or a key deleted, anywhere; and its beginnings."""
    for path in places(GOOD):
        for other in [*OTHER_VALUES, "delete"]:
            changed = copy.deepcopy(GOOD)
            inner: Any = changed
            for key in path[:-1]:
                inner = inner[key]
            if other != "delete":
                inner[path[-1]] = other
            elif isinstance(inner, dict):
                del inner[path[-1]]
            yield json.dumps(changed).encode()
    whole = json.dumps(GOOD, ensure_ascii=False).encode()
    yield from (whole[:end] for end in range(0, len(whole), 7))
    yield from (whole[:at] + b"\xff" + whole[at + 1 :] for at in range(0, len(whole), 7))


def test_a_changed_reply_is_the_same_answer_or_a_fault() -> None:
    same, faults = 0, []
    for body in mutations():
        try:
            found = read_completion(body, EXPECTED)
        except ServerFault as fault:
            faults.append(str(fault))
            continue
        same += 1
        assert (found.ids.tolist(), found.finish_reason) == ([1, 2, END], "stop")
    assert same > 100
    assert len(faults) > 300
    assert all(fault.isprintable() for fault in faults)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html><body>502 upstream</body></html>", r"not JSON .*<html>"),
        (b"", "an empty reply"),
        (b'{"choices": [{"token_ids": [1, 2', "not JSON"),
        (b'{"choices": "\xff\xfe"}', "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"[" * 200000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b"null", "not a JSON object: null"),
        (b"[]", "not a JSON object"),
        (b'{"error": {"message": "worker restarted \\u001b[31m"}}', "worker restarted"),
        (b'{"choices": [], "prompt_token_ids": []}', "'choices'"),
    ],
)
def test_an_invalid_completion_is_reported(body: bytes, words: str) -> None:
    with pytest.raises(ServerFault, match=words):
        read_completion(body, EXPECTED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": [1, 20]}, "the largest id is 20, expected ids below 20"),
        ({"token_ids": [1, IMAGE]}, "the id 18, the placeholder for an image"),
        ({"token_ids": [1, -1]}, "expected a list of token ids"),
        ({"token_ids": [True, 1]}, "expected a list of token ids"),
        ({"token_ids": [1.0]}, "expected a list of token ids"),
        ({"token_ids": [[1]]}, "expected a list of token ids"),
        ({"token_ids": []}, "0 tokens, expected 1 to 4"),
        ({"token_ids": [1] * 5}, "5 tokens, expected 1 to 4"),
        ({"finish_reason": "abort"}, "finish reason is 'abort'"),
        ({"token_ids": [1, 1], "finish_reason": "length"}, "truncated after 2 tokens, expected 4"),
    ],
)
def test_an_answer_that_does_not_match_the_request_is_a_fault(change: dict[str, Any], words: str) -> None:
    body = GOOD | {"choices": [GOOD["choices"][0] | change]}  # type: ignore[index]
    with pytest.raises(ServerFault, match=words):
        read_completion(json.dumps(body).encode(), EXPECTED)


def test_the_prompt_tokens_must_match() -> None:
    with pytest.raises(ServerFault, match=r"token 1 \(ours 8, theirs 6\)"):
        read_completion(json.dumps(GOOD).encode(), replace(EXPECTED, prompt_ids=[5, 8, 7]))
    with pytest.raises(ServerFault, match=r"its length \(ours 2 tokens, theirs 3\)"):
        read_completion(json.dumps(GOOD).encode(), replace(EXPECTED, prompt_ids=[5, 6]))
