"""Names from a model or a file are always shown as visible text, and never control a terminal or page."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp import cli
from coordexp.detections import Detections
from coordexp.drawing.boxes import draw_detections
from coordexp.drawing.panels import MISSED, side_by_side
from coordexp.errors import ConfigError, DataError
from coordexp.infra.printable import PrintableStream, excerpt, printable, printable_lines, printable_tree
from coordexp.prediction import json_line, listing, note_absent
from coordexp.records.gt_vs_pred import ParseReport
from coordexp.reporting.markdown import code, escape
from coordexp.reporting.page import render_page
from coordexp.reporting.style import new_figure, save_figure
from coordexp.stage import stage_main

HOSTILE = (
    *("\x1b]0;owned\x07\x1b[2J", "a\x00b", "cat\nnote: all is well", "cat\r\x1b[1Adog", "\x9b31mred", "\x7f"),
    *("\u202egnp.exe", "\u2066a\u2069", "ca\u200bt", "ca\u200dt", "ca\u00adt", "\ufeffcat", "ca\u034ft"),
    *("ca\u3164t", "ca\u2060t", "cat\U000e0041", "cat\U000e0101", "\u2028cat", "\u0085cat", "cat\u00a0"),
    *("\udcffcat", "\ue000cat"),
)
names = st.text(max_size=20) | st.sampled_from(HOSTILE)


def found(desc: str) -> Detections:
    """One object of this name."""
    return Detections(np.zeros((1, 4)), (desc,), np.ones(1), 8, 8, desc, ParseReport(True, 1, {}))


def through_a_stream(text: str) -> str:
    """The text as it arrives after printing."""
    behind = io.StringIO()
    print(text, file=PrintableStream(behind))  # type: ignore[arg-type]
    return behind.getvalue().removesuffix("\n")


SINKS: dict[str, Callable[[str], str]] = {
    "terminal": through_a_stream,
    "listing": lambda name: listing(Path("a.png"), found(name)),
    "json": lambda name: json_line(Path("a.png"), found(name)),
    "excerpt": excerpt,
    "markdown": escape,
    "code": code,
    "page": lambda name: json.dumps(
        json.loads(render_page({"a": [{name: name}]}).split('id="data">')[1].split("<")[0]), ensure_ascii=False
    ),
}


@given(names)
@settings(max_examples=300)
def test_no_output_contains_invisible_characters(name: str) -> None:
    for sink, show in SINKS.items():
        shown = show(name)
        assert "".join(c for c in shown.removeprefix("\r") if c not in "\n\t").isprintable(), sink
        if sink not in ("terminal", "listing"):  # which have lines
            assert shown.isprintable(), sink
    assert len(listing(Path("a.png"), found(name)).split("\n")) == 2


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_as_escape_sequences(name: str) -> None:
    assert "\\" in printable(name)
    assert json.loads(f'"{printable(name)}"') == name


@given(names)
def test_plain_names_are_unchanged_and_escaping_is_idempotent(name: str) -> None:
    assert printable(printable(name)) == printable(name)
    assert printable("caf\u00e9 \u4eba \u05d0 \u26bd\ufe0f a|b\\") == "caf\u00e9 \u4eba \u05d0 \u26bd\ufe0f a|b\\"
    assert printable_tree({name: [name, 1, None]}) == {printable(name): [printable(name), 1, None]}


@given(st.text(max_size=10), st.text(max_size=10))
def test_line_breaks_of_our_own_text_are_kept(one: str, other: str) -> None:
    assert printable_lines(f"{printable(one)}\n\t{printable(other)}") == f"{printable(one)}\n\t{printable(other)}"


@given(names)
def test_escaped_json_has_the_same_value(name: str) -> None:
    assert json.loads(through_a_stream(json.dumps({"desc": name}, ensure_ascii=False))) == {"desc": name}


def test_foreign_text_is_shortened() -> None:
    assert excerpt(b"<b>\x1b]0;title\x07\xff\n") == "<b>\\u001b]0;title\\u0007\ufffd\\n"
    assert len(excerpt("x" * 10**6)) < 400


@pytest.mark.parametrize("name", HOSTILE)
def test_figures_show_the_escape_sequences(name: str, tmp_path: Path) -> None:
    ground = Image.new("RGB", (64, 64), "white")

    def drawn(label: str) -> bytes:
        return side_by_side([(label, draw_detections(ground, [[8, 8, 40, 40]], [label], [0.5], [MISSED]))]).tobytes()

    def plotted(label: str) -> bytes:
        figure = new_figure(2, 1)
        figure.subplots().set_title(label.replace("\n", "\\n"))  # of which titles have their own
        save_figure(figure, tmp_path / "figure.png")
        return (tmp_path / "figure.png").read_bytes()

    assert drawn(name) == drawn(printable(name))
    assert plotted(name) == plotted(printable(name))


def test_messages_logs_and_tables_of_commands_and_stages_are_printable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error class each, with a file in its message; the streams are restored afterwards."""
    before = sys.stdout, sys.stderr
    hostile = "".join(HOSTILE).replace("\n", "")

    def command(*_: object, **__: object) -> None:
        print(hostile)
        raise DataError(f"{hostile}: no such file.")

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit):
        cli.main([])

    def run(context: object) -> None:
        """Stage."""

    def refused(*_: object) -> None:
        logging.getLogger("coordexp").error(hostile)
        raise ConfigError(f"{hostile}: no such file.")

    monkeypatch.setattr("coordexp.stage._context", refused)
    handlers = logging.getLogger().handlers[:]
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    try:
        assert stage_main(run, []) == 2
    finally:
        logging.getLogger().handlers[:] = handlers
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert [text.count("]0;owned") for text in (out, err)] == [2, 2]
    assert (out + err).replace("\n", "").isprintable()


def test_notes_about_names_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    note_absent(["cat"], set(HOSTILE) - {"\udcffcat"})
    assert capsys.readouterr().err.replace("\n", "").isprintable()
