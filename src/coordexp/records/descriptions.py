"""What an object may be called: descriptions are data, and may not pose as markup of the prompt or the answer."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_DESC_CHARS = 256
_SPACES = str.maketrans("_()", "   ")
# <|im_end|>, <|coord_5|>, <|image_pad|>: the surface form of Qwen's special tokens, and of ours.
MARKER = re.compile(r"<\|[^<>|]{0,40}\|>|</?think>|</?tool_(?:call|response)>")


def clean_desc(desc: object) -> object:
    """Outer and repeated white space removed, accents as the tokenizer writes them (NFC); what is no text stays."""
    if not isinstance(desc, str):
        return desc
    plain = " ".join(desc.split())
    return plain if plain.isascii() else unicodedata.normalize("NFC", plain)


def desc_problem(desc: object) -> str:
    """The drop reason of a description, or the empty string.

    `desc_missing` is no text at all, `desc_marker` holds a chat marker or coordinate token, `desc_characters` holds
    control, private-use or half characters (the parser keeps the private-use area for coordinates), `desc_too_long` is
    over 256 characters.
    """
    return _text_problem(desc) if isinstance(desc, str) else "desc_missing"


@lru_cache(maxsize=1 << 16)  # a data set has few names, and each of them many times
def _text_problem(desc: str) -> str:
    if not desc.strip():
        return "desc_missing"
    if MARKER.search(desc):
        return "desc_marker"
    if any(unicodedata.category(char) in ("Cc", "Co", "Cs") for char in desc):
        return "desc_characters"
    if all(char.isspace() or unicodedata.category(char) == "Cf" for char in desc):  # nothing to be seen
        return "desc_missing"
    return "desc_too_long" if len(desc) > MAX_DESC_CHARS else ""


def normalise_desc(desc: str) -> str:
    """Lower case, NFC; `_`, parentheses and control characters become spaces; spaces are squeezed and stripped."""
    lower = desc.lower()
    if lower.isascii() and lower.isprintable():  # nearly always, and much faster
        return " ".join(lower.translate(_SPACES).split())
    composed = unicodedata.normalize("NFC", lower)
    spaced = "".join(" " if c in "_()" or unicodedata.category(c) == "Cc" else c for c in composed)
    return " ".join(spaced.split())
