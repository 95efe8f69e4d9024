"""Size budgets: what outgrows them is split, not tolerated."""

from __future__ import annotations

import ast

import pytest

from source_tree import modules, syntax

MODULE_LINES = 450
ENTRY_LINES = 80
FUNCTION_LINES = 60


@pytest.mark.parametrize("module", sorted(modules()))
def test_module_and_function_sizes(module: str) -> None:
    file = modules()[module]
    budget = ENTRY_LINES if module.startswith("pipelines") else MODULE_LINES
    assert len(file.read_text(encoding="utf-8").splitlines()) <= budget
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{module}.{node.name} has {lines} lines"
