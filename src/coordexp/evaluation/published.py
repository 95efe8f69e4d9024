"""Published numbers, kept as data so that a report can set a run beside them with their protocol."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def published_tables() -> dict[str, dict[str, Any]]:
    """The tables of published.json by name.

    Each has `title`, `source`, `rows`, and either one `protocol` for all rows or `protocols` that the rows refer to by
    name. AP and F1 are in 0..1. `mark` says how the number is known: paper, source read, or reported and not
    reproduced.
    """
    return json.loads(files(__package__).joinpath("published.json").read_text(encoding="utf-8"))
