"""The import graph, read from the source files without running them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from coordexp.infra.code_hash import Modules

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "coordexp"
TOYWORLD = ROOT / "src" / "toyworld"
BASE = ROOT / "pipelines" / "base"

# Lower layers first: a layer imports only itself and those before it.
LAYERS = (
    "errors", "infra", "config", "inputs", "stage", "geometry", "records", "drawing", "text", "packing", "models",
    "losses", "matching", "rollout", "training", "evaluation", "doctor", "reporting", "export", "experiments",
    "detections", "detector", "prediction", "cli",
)  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of the packages and the pipeline entries."""
    found = Modules.below(PACKAGE.parent, ROOT).files
    roots = (PACKAGE.name, TOYWORLD.name, "pipelines")
    return {name: file for name, file in sorted(found.items()) if name.split(".")[0] in roots}


@cache
def syntax(file: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def layer_of(module: str) -> str:
    """ "coordexp.text.parser" -> "text"; the empty string for the package itself, its version, and other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "coordexp" and len(parts) > 1 and parts[1] != "__version__" else ""


def imports(file: Path) -> Iterator[str]:
    """Every name a file imports, anywhere in it: "a.b" for `import a.b`, also "a.b.c" for `from a.b import c`."""
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: relative import; write the full name"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lazy_names() -> set[str]:
    """What `imports` says of the package itself for its names that are loaded on first use."""
    body = syntax(PACKAGE / "__init__.py").body
    blocks = [node.body for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    named = [node for block in blocks for node in block if isinstance(node, ast.ImportFrom)]
    return {str(n.module) for n in named} | {f"{n.module}.{alias.name}" for n in named for alias in n.names}
