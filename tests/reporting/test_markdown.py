"""Text from data stays text, and numbers keep the digits of their file."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from coordexp.reporting.markdown import code, escape, flatten, number, percent, signed, table


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
def test_markup_in_a_name_is_shown_and_not_obeyed(name: str) -> None:
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
