"""A hash of the code that an entry point runs: its module and all modules of the repository that it imports.

The hash covers the syntax tree, not the text. It leaves out what changes no result: comments, layout, docstrings, the
version number, and the declarations of parameters (a field with a description, a validator), because the values of
parameters are recorded where they are read. Editing prose therefore retrains nothing, and the hash is the same in every
version of Python that parses the sources alike.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_SKIPPED_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_params"})  # redundant, or not in every Python
_VALIDATORS = ("model_validator", "field_validator")


@cache
def code_hash(*entries: str) -> str:
    """The hash of modules of this package, as `Modules.code_hash` computes it."""
    package = Path(__file__).parents[1]  # not its siblings: in site-packages these are all other packages
    return Modules(_named(package.rglob("*.py"), package.parent)).code_hash(*entries)


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a repository by their dotted names."""

    files: Mapping[str, Path]

    @classmethod
    def below(cls, *roots: Path) -> Modules:
        """The modules that Python finds in these folders: packages and top-level files."""
        files: dict[str, Path] = {}
        for root in reversed(roots):
            files |= _named(root.glob("*.py"), root)
            for package in root.glob("*/__init__.py"):
                files |= _named(package.parent.rglob("*.py"), root)
        return cls(files)

    def code_hash(self, *entries: str, left_out: Collection[str] = ()) -> str:
        """First 16 hex digits of a hash of the modules that the entries can load, and of the data files they name.

        Args:
            entries: dotted names of modules; a package means all its modules.
            left_out: modules that are neither hashed nor followed.
        """
        # Names are part of the hash, so moving code between modules changes it; files are hashed by content, not path.
        digest = hashlib.sha256()
        for name in sorted(self.import_closure(*entries, left_out=left_out)):
            file = self.files[name]
            digest.update(f"{name}:{_source_of(file).digest}\n".encode())
            for data in self.data_files(name):
                content = _source_of(data).digest if data.suffix == ".py" else _bytes_hash(data)
                digest.update(f"{name}/{data.relative_to(file.parent).as_posix()}:{content}\n".encode())
        return digest.hexdigest()[:16]

    def import_closure(self, *entries: str, left_out: Collection[str] = ()) -> set[str]:
        """The modules that the entries can load, packages included; imports inside functions count."""
        found: set[str] = set()
        waiting = [name for name in self.files for entry in entries if name == entry or name.startswith(f"{entry}.")]
        while waiting:
            name = waiting.pop()
            if name in self.files and name not in found and name not in left_out:
                found.add(name)
                # Importing a.b.c also runs a/__init__.py and a/b/__init__.py.
                parts = name.split(".")
                waiting += [*_source_of(self.files[name]).imports, *(".".join(parts[:n]) for n in range(1, len(parts)))]
        return found

    def data_files(self, name: str) -> list[Path]:
        """The files next to a module that its strings name, directly or by folder: templates, tables."""
        if "." not in name:  # a top-level module: its siblings are the whole repository
            return []
        file = self.files[name]
        words = _source_of(file).words
        named = [path for path in sorted(file.parent.iterdir()) if path.name in words and path.suffix != ".py"]
        folders = [path for path in named if path.is_dir() and not (path / "__init__.py").exists()]
        inside = [path for folder in folders for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]
        return [path for path in [*named, *inside] if path.is_file()]


def _named(files: Iterable[Path], root: Path) -> dict[str, Path]:
    parts = {file: file.relative_to(root).with_suffix("").parts for file in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in parts.items()}


@dataclass(slots=True)
class _Source:
    """The parts of one source file that can change a result."""

    imports: set[str] = field(default_factory=set)
    words: set[str] = field(default_factory=set)  # its string constants
    digest: str = ""


def _source_of(file: Path) -> _Source:
    return _read(file.read_text(encoding="utf-8"))


@cache
def _read(text: str) -> _Source:
    source, parts = _Source(), list[str]()
    _write(ast.parse(text), parts, source)
    source.digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    return source


def _write(node: object, parts: list[str], source: _Source) -> None:
    """Append the canonical text of a syntax tree to `parts`, and collect its imports and string constants.

    `ast.dump` is not used: its output differs between versions of Python.
    """
    if isinstance(node, list):
        parts.append("[")
        for item in node:
            if not _is_prose(item):
                _write(item, parts, source)
        parts.append("]")
    elif isinstance(node, ast.AST):
        source.imports.update(_imported(node))
        parts.append(f"({type(node).__name__}")
        for name in node._fields:
            value = getattr(node, name, None)
            # Empty fields are omitted: newer versions of Python add fields, which are empty for old syntax.
            if value is not None and value != [] and name not in _SKIPPED_FIELDS:
                parts.append(f" {name}=")
                _write(value, parts, source)
        parts.append(")")
    else:
        parts.append(repr(node))
        if isinstance(node, str):
            source.words.add(node)


def _is_prose(node: object) -> bool:
    """Whether a statement changes no result: docstring, version, type-checking block, or parameter declaration."""
    match node:
        # Any string statement counts as prose, not only the first one: attribute docstrings do not change results.
        case ast.Expr(value=ast.Constant(value=str())) | ast.Assign(targets=[ast.Name(id="__version__")]):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]):
            return True
        case ast.AnnAssign(value=ast.Call(func=ast.Name(id="Field"), keywords=keywords)):
            return any(keyword.arg == "description" for keyword in keywords)
        case ast.FunctionDef(decorator_list=[ast.Call(func=ast.Name(id=name)), *_]):
            return name in _VALIDATORS
    return False


def _imported(node: ast.AST) -> list[str]:
    """The names of an import: "a.b" of `import a.b`, "a.b" and "a.b.c" of `from a.b import c`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, f"line {node.lineno}: relative import of {node.module}; write the full name"
        return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _bytes_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
