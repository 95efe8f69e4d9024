"""The words of docs/glossary.md: prose uses the field's terms, and the table's old ones stay out.

Reads documents, docstrings, messages and templates; a part of `make checks`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from source_tree import PACKAGE, ROOT, syntax

GLOSSARY = ROOT / "docs" / "glossary.md"
CODE = re.compile(r"`[^`\n]*`|<!--.*?-->|(?<=\])\([^)\s]+\)|\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "src" / "toyworld").rglob("*.py")])
TEMPLATES = sorted(path for suffix in ("jinja", "html", "j2") for path in PACKAGE.rglob(f"*.{suffix}"))
PAGES = sorted({*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"} - {GLOSSARY})


def rows(heading: str) -> list[list[str]]:
    """The cells of the table of the glossary that has this first heading."""
    table = GLOSSARY.read_text("utf-8").split(f"\n| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


@cache
def rules() -> list[tuple[re.Pattern[str], str, set[str]]]:
    """Refused pattern, what to write instead, and where it is refused; a space matches a line break, too."""
    return [
        (re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), instead, set(where.split(", ")))
        for _, instead, patterns, where in rows("not")
        for pattern in re.findall(r"`([^`]+)`", patterns)
    ]


def passages(file: Path) -> Iterator[tuple[int, str]]:
    """First line and text of each piece of prose: of a source each string that is more than one word."""
    if file.suffix != ".py":
        yield 1, file.read_text(encoding="utf-8")
        return
    inner = set[int]()
    for node in ast.walk(syntax(file)):  # a formatted string comes before its parts
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values}
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and id(node) not in inner and " " in str(node.value):
            yield node.lineno, str(node.value)


def findings(file: Path, place: str) -> Iterator[str]:
    """Every refused phrase of a file that the glossary does not allow there."""
    name = file.relative_to(ROOT).as_posix()
    allowed = [phrase.strip("`") for phrase, where, _ in rows("phrase") if where.strip("`") == name]
    for line, text in passages(file):
        prose = CODE.sub(lambda found: re.sub(r"[^\n]", "~", found[0]), text)
        for pattern, instead, where in rules():
            for found in pattern.finditer(prose) if place in where else ():
                context = " ".join(prose[max(0, found.start() - 30) : found.end() + 30].split())
                if not any(phrase in context for phrase in allowed):
                    yield f"{name}:{line + prose.count(chr(10), 0, found.start())}: ...{context}... -> {instead}"


@pytest.mark.parametrize(("place", "files"), [("docs", PAGES), ("src", [*SOURCES, *TEMPLATES])], ids=["docs", "src"])
def test_prose_uses_the_words_of_the_glossary(place: str, files: list[Path]) -> None:
    found = [line for file in files for line in findings(file, place)]
    assert not found, "\n".join([f"{len(found)} phrases that docs/glossary.md replaces:", *found])


def test_the_table_is_read(tmp_path: Path) -> None:
    """Else nothing would be refused; and what is allowed is there."""
    refused = [(pattern.search("12 tokens an\nobject"), instead) for pattern, instead, _ in rules()]
    assert [instead for found, instead in refused if found] == ["per image, per object"]
    assert all(where <= {"docs", "src"} for *_, where in rules())
    for phrase, file, reason in rows("phrase"):
        assert phrase.strip("`") in " ".join((ROOT / file.strip("`")).read_text("utf-8").split()), file
        assert reason
