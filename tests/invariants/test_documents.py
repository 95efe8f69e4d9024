"""Documents point at what exists: links, files, functions and parameters."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from coordexp.config.block import field_specs
from coordexp.config.schema import Params
from source_tree import PACKAGE, ROOT, syntax

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http", "#")):
            continue
        file, _, anchor = target.partition("#")
        assert (page.parent / file).exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(page.parent / file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def index_rows() -> list[str]:
    text = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", index_rows(), ids=lambda row: row.split("|")[1].strip())
def test_the_paper_index_names_files_and_functions_that_exist(row: str) -> None:
    place = row.split("|")[3]
    files = re.findall(r"`([a-z0-9_]+/[a-z0-9_]+\.py)`", place)
    assert files, row
    defined: set[str] = set()
    for file in files:
        assert (PACKAGE / file).is_file(), file
        defined |= {n.name for n in ast.walk(syntax(PACKAGE / file)) if isinstance(n, ast.FunctionDef)}
    for function in re.findall(r"`([a-z0-9_]+)`", place):
        assert function in defined, function


def test_the_readme_says_of_every_term_of_the_objective_where_it_lives() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("### Where a loss lives")[1].split("\n[")[0]
    rows = dict(re.findall(r"^\| `(?:stage2\.)?([a-z0-9_]+)_weight` \| (.+) \|$", text, flags=re.MULTILINE))
    objective = syntax(PACKAGE / "losses" / "objective.py")
    weights = next(n for n in ast.walk(objective) if isinstance(n, ast.ClassDef) and n.name == "ObjectiveWeights")
    terms = {n.target.id for n in weights.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert rows.keys() == terms
    for term, place in rows.items():
        file, function = re.match(r"`(losses/[a-z_]+\.py)`: `([a-z0-9_]+)`", place).groups()
        defined = {n.name for n in ast.walk(syntax(PACKAGE / file)) if isinstance(n, ast.FunctionDef)}
        assert function in defined, term


def test_recipes_set_parameters_that_exist() -> None:
    keys = {spec.key for spec in field_specs(Params)}
    for page in PAGES:
        for key in re.findall(r"-S ([a-z][a-z0-9_.]*)=", page.read_text(encoding="utf-8")):
            assert key in keys or key == "key", f"{page.name}: {key}"
