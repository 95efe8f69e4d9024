"""Text from data stays text, and numbers keep the digits of their file."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from coordexp.reporting.markdown import code, decimals, escape, flatten, number, percent, signed, table, with_interval


def rendered_cells(markdown: str) -> list[str]:
    """The cells of a rendered table, as a browser would show them."""
    page = MarkdownIt("commonmark").enable("table").render(markdown)
    cells = re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", page, flags=re.DOTALL)
    return [html.unescape(re.sub("^<code>(.*)</code>$", r"\1", cell)) for cell in cells]


@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        "`rm -rf`",
        "<script>alert(1)</script>",
        "![x](y.png)",
        "*bold* _it_ ~~gone~~",
        "back\\slash|",
        "AT&amp;T",
        "$x$",
        "`a` @b",
        "#1`",
    ],
)
def test_markup_in_a_name_is_shown_as_text(name: str) -> None:
    assert rendered_cells(table(["name"], [[escape(name)]])) == ["name", name]


@given(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30))
def test_any_printable_name_survives_a_table_cell(name: str) -> None:
    for shown in (escape(name), code(name)):
        assert rendered_cells(table(["n"], [[shown]]))[1].replace("\\u007c", "|") == name


@pytest.mark.parametrize(
    "name",
    ["https://x.y/z", "www.x.y", "mailto:a@x.y", "xmpp:a", "a@x.y", "@user", "see #12", "a/b#1", "gh-12", "a|@b"],
)
def test_addresses_and_mentions_in_a_name_are_code(name: str) -> None:
    page = MarkdownIt("commonmark").enable("table").render(table(["n"], [[escape(name)]]))
    assert f"<code>{name}</code>".replace("|", "\\u007c") in page


def test_line_breaks_and_direction_marks_cannot_leave_the_cell() -> None:
    assert escape("a\nb\r\u2028c\u202ed") == r"a\\nb\\r\\u2028c\\u202ed"


def test_a_table_needs_a_full_row() -> None:
    with pytest.raises(AssertionError, match="2 cells for 3 columns"):
        table(["a", "b", "c"], [["1", "2"]])


def test_numbers() -> None:
    assert [number(v) for v in (0.5, 12, None, True, "x")] == ["0.5000", "12", "n/a", "yes", "x"]
    assert [signed(v) for v in (0.01, -0.25, 3, -3)] == ["+0.0100", "-0.2500", "+3", "-3"]
    assert [percent(v) for v in (0.934, 0.0712, 0.0001, 0.0, 1.0)] == ["93 %", "7.1 %", "under 0.1 %", "0.0 %", "100 %"]


def test_flatten_names_every_leaf() -> None:
    tree = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": None}], "f": {}}
    assert flatten(tree) == [("a.b", 1), ("a.c", "1, 2"), ("d[0].e", None)]


@pytest.mark.parametrize(
    ("value", "bounds", "sign", "shown"),
    [
        (0.3856, (0.3644, 0.4081), False, "0.386 [0.364, 0.408]"),  # half-width .022: two digits
        (0.6404, (0.5904, 0.6904), False, "0.64 [0.59, 0.69]"),  # .050: one
        (0.0040, (-0.0073, 0.0153), True, "+0.004 [-0.007, +0.015]"),
        (0.0219, (0.0002, 0.0403), True, "+0.0219 [+0.0002, +0.0403]"),  # the sign of a bound is seen
        (21.64, (19.1, 24.2), False, "21.6 [19.1, 24.2]"),
        (216.4, (116.0, 316.0), False, "216 [116, 316]"),
        (1.0, (1.0, 1.0), False, "1.0000 [1.0000, 1.0000]"),
        (0.25, None, False, "0.2500"),
        (None, None, False, "n/a"),
    ],
)
def test_an_interval_sets_the_number_of_digits(value: Any, bounds: Any, sign: bool, shown: str) -> None:
    assert with_interval(value, bounds, sign=sign) == shown


@given(st.floats(-1, 1), st.floats(1e-3, 1))
def test_rounding_error_is_below_a_sixth_of_the_half_width(low: float, half_width: float) -> None:
    digits = decimals((low, low + 2 * half_width))
    assert 0 <= digits <= 4
    assert 0.5 * 10**-digits <= half_width / 6 or digits == 4
