"""What a reader may find is written whole or not at all: by the helpers of infra/files.py, not in place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from source_tree import modules, syntax

IN_PLACE = {"write_text", "write_bytes"}
# Where a half file harms nobody, and why.
ALLOWED = {
    "coordexp.infra.files": "the helpers themselves",
    "coordexp.rollout.vllm_server": "a temporary folder of its own",
}


@pytest.mark.parametrize("module", sorted(name for name in modules() if name not in ALLOWED))
def test_nothing_is_written_in_place(module: str) -> None:
    assert in_place(modules()[module]) == []


def in_place(file: Path) -> list[str]:
    """Calls of `.write_text(...)` and `.write_bytes(...)` on a path that no `with replacing(...)` gave."""
    temporary: set[str] = set()
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.With):
            for item in node.items:
                if ast.unparse(item.context_expr).startswith("replacing(") and item.optional_vars:
                    temporary.add(ast.unparse(item.optional_vars))
    return [
        f"{file.name}:{node.lineno}"
        for node in ast.walk(syntax(file))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in IN_PLACE
        and ast.unparse(node.func.value) not in temporary
    ]


def test_what_the_reader_sees(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "with replacing(path) as temporary:\n    temporary.write_text('a')\n(folder / 'b').write_bytes(b'')\n"
        "write_text(path, 'c')\n"
    )
    assert in_place(file) == ["a.py:3"]
