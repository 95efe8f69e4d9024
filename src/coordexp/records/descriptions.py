"""Valid descriptions of objects: descriptions are data and must not look like markup of prompt or answer."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_DESC_CHARS = 256
_SPACES = str.maketrans("_()", "   ")
# <|im_end|>, <|coord_5|>, <|image_pad|>: the written form of Qwen's special tokens and of ours.
MARKER = re.compile(r"<\|[^<>|]{0,40}\|>|</?think>|</?tool_(?:call|response)>")


def clean_desc(desc: object) -> object:
    """Strip and collapse white space, and normalize accents as the tokenizer does (NFC); other types are unchanged."""
    if not isinstance(desc, str):
        return desc
    plain = " ".join(desc.split())
    return plain if plain.isascii() else unicodedata.normalize("NFC", plain)


def desc_problem(desc: object) -> str:
    """The drop reason of a description, or the empty string.

    `desc_missing`: no visible text. `desc_marker`: contains a chat marker or coordinate token. `desc_characters`:
    contains control characters, unpaired surrogates, or private-use characters (the parser uses them for coordinates).
    `desc_too_long`: more than 256 characters.
    """
    return _text_problem(desc) if isinstance(desc, str) else "desc_missing"


@lru_cache(maxsize=1 << 16)  # a data set repeats a few descriptions many times
def _text_problem(desc: str) -> str:
    if not desc.strip():
        return "desc_missing"
    if MARKER.search(desc):
        return "desc_marker"
    if any(unicodedata.category(char) in ("Cc", "Co", "Cs") for char in desc):
        return "desc_characters"
    if all(char.isspace() or unicodedata.category(char) == "Cf" for char in desc):  # nothing visible
        return "desc_missing"
    return "desc_too_long" if len(desc) > MAX_DESC_CHARS else ""


def normalise_desc(desc: str) -> str:
    """Lower case, NFC; `_`, parentheses and control characters become spaces; spaces are collapsed and stripped."""
    lower = desc.lower()
    if lower.isascii() and lower.isprintable():  # the common case, and much faster
        return " ".join(lower.translate(_SPACES).split())
    composed = unicodedata.normalize("NFC", lower)
    spaced = "".join(" " if c in "_()" or unicodedata.category(c) == "Cc" else c for c in composed)
    return " ".join(spaced.split())
