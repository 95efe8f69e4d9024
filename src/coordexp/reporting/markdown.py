"""GitHub Markdown: tables, numbers, and text from data that must not act as markup."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from coordexp.infra.printable import printable

Align = Literal["l", "r"]
MISSING = "n/a"
MAX_DECIMALS = 4  # of metrics.json
_RULES = {"l": ":---", "r": "---:"}
# What GitHub reads as markup inside a line; `<`, `>` and `&` become entities before.
_MARKUP = re.compile(r"([\\`*_\[\]|~$])")
# What GitHub turns into a link or a mention even if escaped (addresses, people, issues), except inside code.
_LIVE = re.compile(r"://|\bwww\.|\b(?:mailto|xmpp):|@\w|#\d|\bGH-\d", re.IGNORECASE)


def escape(text: str) -> str:
    """Text from data (names, paths) as literal Markdown: no markup, link or mention, and all of it shows."""
    if _LIVE.search(text):
        return code(text)
    return _MARKUP.sub(r"\\\1", html.escape(printable(text), quote=False))


def code(text: str) -> str:
    """Text from data as a span of code, in a table too."""
    # A pipe would end the cell of a table; outside of one, its escape would show.
    shown = printable(text).replace("|", "\\u007c")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if not shown.strip() or {shown[0], shown[-1]} & {"`", " "} else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def number(value: Any) -> str:
    """A metric as in metrics.json: floats with the four digits of that file, None as n/a."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}"
    return str(value)


def decimals(bounds: Sequence[float]) -> int:
    """Digits after the point that an interval supports: two digits of its half-width if they are below 36, else one.

    The rule of the Particle Data Group. A bound close to 0 has more, so that its sign shows; the maximum is four.
    """
    half_width = (bounds[1] - bounds[0]) / 2
    if half_width <= 0:
        return MAX_DECIMALS
    exponent = math.floor(math.log10(half_width))
    leading = half_width / 10**exponent
    digits = (1 if leading < 3.55 else 0) - exponent
    while digits < MAX_DECIMALS and any(bound and not round(bound, max(0, digits)) for bound in bounds):
        digits += 1
    return min(max(digits, 0), MAX_DECIMALS)


def with_interval(value: float | None, bounds: Sequence[float] | None, *, sign: bool = False) -> str:
    """A number and its interval in brackets, in the digits that the interval supports; without an interval `number`."""
    if value is None or bounds is None:
        return signed(value) if sign and value is not None else number(value)
    shown = f"{'+' if sign else ''}.{decimals(bounds)}f"
    return f"{value:{shown}} [{bounds[0]:{shown}}, {bounds[1]:{shown}}]"


def signed(value: float | int) -> str:
    """A difference with its sign."""
    return f"{value:+.4f}" if isinstance(value, float) else f"{value:+d}"


def significant(value: float, digits: int = 4) -> str:
    """A training quantity, which may span many decades, with significant digits."""
    return f"{value:.{digits}g}"


def counted(n: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is one."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def percent(value: float) -> str:
    """A fraction as whole percent, or with one digit below 10 %."""
    if 0 < abs(value) < 0.0005:
        return "under 0.1 %"
    return f"{100 * value:.0f} %" if abs(value) >= 0.0995 else f"{100 * value:.1f} %"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A pipe table; cells are finished Markdown.

    `align` has one letter per column, l or r; by default the first column is aligned left and the others right.
    """
    align = align or "l" + "r" * (len(header) - 1)
    assert len(align) == len(header), f"{len(align)} alignments for {len(header)} columns"
    lines = [header, [_RULES[a] for a in align], *rows]
    for line in lines:
        assert len(line) == len(header), f"{len(line)} cells for {len(header)} columns: {line}"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested JSON as (dotted key, value); a list of plain values is one leaf, spelled with commas."""
    if isinstance(tree, dict):
        return [
            leaf for key, value in tree.items() for leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(tree, list | tuple):
        if any(isinstance(item, dict | list) for item in tree):
            return [leaf for i, item in enumerate(tree) for leaf in flatten(item, f"{prefix}[{i}]")]
        return [(prefix, ", ".join(str(item) for item in tree))]
    return [(prefix, tree)]
