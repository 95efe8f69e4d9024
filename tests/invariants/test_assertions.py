"""`assert` states what the program itself guarantees; what a user hands in is checked by errors that survive `-O`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from source_tree import modules, syntax

# Modules that a user's files and arguments enter by.
ENTRANCES = ("pipelines.", "coordexp.cli", "coordexp.detector", "coordexp.records.", "coordexp.infra.provenance",
             "coordexp.stage", "coordexp.evaluation.table", "coordexp.models.loading",
             "coordexp.rollout.vllm_client", "coordexp.rollout.opening")  # fmt: skip
# Values that come from a file or a command line under these names, wherever they are tested.
FROM_USERS = {"path", "folder", "file", "row", "argv", "args", "params", "profile", "settings", "record"}


def assertions(tree: ast.AST) -> Iterator[ast.Assert]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Assert))


def names_in(node: ast.expr) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


@pytest.mark.parametrize("module", sorted(name for name in modules() if name.startswith(ENTRANCES)))
def test_where_users_enter_nothing_is_asserted(module: str) -> None:
    assert [node.lineno for node in assertions(syntax(modules()[module]))] == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_value_of_a_user_is_asserted(module: str) -> None:
    tested = {node.lineno: names_in(node.test) & FROM_USERS for node in assertions(syntax(modules()[module]))}
    assert {line: names for line, names in tested.items() if names} == {}


def test_what_the_reader_sees() -> None:
    tree = ast.parse("def load(path):\n    assert path.suffix == '.json'\n    assert 1 + 1 == 2\n")
    assert [names_in(node.test) & FROM_USERS for node in assertions(tree)] == [{"path"}, set()]
