"""Pictures are opened in one place: every part sees the same pixels of a file, and no other decoder is reached."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from source_tree import ROOT, modules, syntax

READER = "coordexp.records.images"
FILES = modules() | {f"benchmarks.{file.stem}": file for file in (ROOT / "benchmarks").glob("*.py")}


def openings(tree: ast.AST) -> Iterator[int]:
    """Line numbers of `PIL.Image.open` under any name, and of other libraries' readers of pictures."""
    pillow = {"PIL.Image"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "PIL":
            pillow |= {alias.asname or alias.name for alias in node.names if alias.name == "Image"}
        elif isinstance(node, ast.Import):
            pillow |= {alias.asname for alias in node.names if alias.name == "PIL.Image" and alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            yield from (node.lineno for alias in node.names if alias.name == "open")
        elif isinstance(node, ast.Attribute) and (
            node.attr in ("imread", "imdecode", "read_image", "decode_image", "exif_transpose")
            or (node.attr == "open" and ast.unparse(node.value) in pillow)
        ):
            yield node.lineno


@pytest.mark.parametrize("module", sorted(FILES.keys() - {READER}))
def test_no_other_module_opens_pictures(module: str) -> None:
    assert list(openings(syntax(FILES[module]))) == [], f"use {READER}: read_rgb, to_rgb or open_image"


def test_the_reader_names_its_formats() -> None:
    opened = [
        node
        for node in ast.walk(syntax(FILES[READER]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert [[keyword.arg for keyword in call.keywords] for call in opened] == [["formats"]]


@pytest.mark.parametrize(
    "code",
    [
        "from PIL import Image\nImage.open(path)",
        "from PIL import Image as Picture\nread = Picture.open",
        "import PIL.Image\nPIL.Image.open(path)",
        "import PIL.Image as I\nI.open(path)",
        "from PIL.Image import open",
        "import cv2\ncv2.imread(path)",
    ],
)
def test_what_counts_as_opening(code: str) -> None:
    assert list(openings(ast.parse(code)))
    assert not list(openings(ast.parse("path.open()\nopen(path)\nImage.new('RGB', size)")))
