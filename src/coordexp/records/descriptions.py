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
    """Outer and repeated white space removed; anything but a string is returned as it is."""
    return " ".join(desc.split()) if isinstance(desc, str) else desc


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
    return "desc_too_long" if len(desc) > MAX_DESC_CHARS else ""


def normalise_desc(desc: str) -> str:
    """Lower case; `_`, parentheses and control characters become spaces; spaces are squeezed and stripped."""
    lower = desc.lower()
    if lower.isascii() and lower.isprintable():  # nearly always, and much faster
        return " ".join(lower.translate(_SPACES).split())
    spaced = "".join(" " if c in "_()" or unicodedata.category(c) == "Cc" else c for c in lower)
    return " ".join(spaced.split())
