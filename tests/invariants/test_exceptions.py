"""No handler swallows errors that it does not name."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from source_tree import modules, syntax

BROAD = {"Exception", "BaseException"}


def broad_handlers(tree: ast.AST) -> Iterator[int]:
    """Line numbers of `except:` and of handlers that catch every error, alone or in a tuple."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or (isinstance(kind, ast.Name) and kind.id in BROAD) for kind in caught):
                yield node.lineno


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_broad_except(module: str) -> None:
    assert list(broad_handlers(syntax(modules()[module]))) == []


@pytest.mark.parametrize(
    ("handler", "is_broad"),
    [
        ("except:", True),
        ("except Exception:", True),
        ("except (ValueError, BaseException) as error:", True),
        ("except ValueError:", False),
        ("except (ValueError, KeyError):", False),
    ],
)
def test_what_counts_as_broad(handler: str, is_broad: bool) -> None:
    tree = ast.parse(f"try:\n    pass\n{handler}\n    pass\n")
    assert list(broad_handlers(tree)) == [3] * is_broad
