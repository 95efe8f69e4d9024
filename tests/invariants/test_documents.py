"""Documents refer only to existing links, files, functions, parameters and pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from coordexp.config.block import field_specs
from coordexp.config.schema import Params
from source_tree import PACKAGE, ROOT, modules, syntax

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# The code composes the names of metrics and reasons; tests/reporting/test_reference.py checks that page.
WRITTEN_PAGES = [page for page in PAGES if page.name != "metrics.md"]
SOURCES = sorted([*modules().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
# The example in CONTRIBUTING, and foreign names: files of a data set, settings of accelerate, CUDA and OpenMP.
NOT_OURS = {
    "huber_weight", "zhiyuan_objv2_", "MULTI_CPU", "CUDA_VISIBLE_DEVICES", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY",
}  # fmt: skip
# Pages that runs write: not in the repository, or not under the name in the source.
WRITTEN_BY_RUNS = {"progress.md", "model_card.md", "objective.md", "decoding.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_existing_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http", "#")):
            continue
        file, _, anchor = target.partition("#")
        assert (page.parent / file).exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(page.parent / file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, in the form of GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def file_named(path: str) -> Path | None:
    """The source file for a path in a page, relative to the root of the repository, src/ or src/coordexp/."""
    return next((base / path for base in (ROOT, PACKAGE.parent, PACKAGE) if (base / path).is_file()), None)


@cache
def names_in(file: Path) -> frozenset[str]:
    """What a file defines: functions, classes, `Class.method`, fields, and names of the module."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.update({node.name, prefix + node.name})
                if isinstance(node, ast.ClassDef):
                    collect(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(syntax(file).body, "")
    return frozenset(found)


def named_places(text: str) -> Iterator[tuple[str, str]]:
    """(file, name in it or "") of every reference in a page: `a.py`, `a.py:name`, `a.py`: `name`, `name` in `a.py`."""
    path, name = r"([\w/.-]+\.py)", r"([A-Za-z_][\w.]*)"
    yield from re.findall(rf"`(?:[^`\n]* )?{path}(?::{name})?[^`\n]*`", text)
    yield from re.findall(rf"`{path}`: `{name}`", text)
    yield from ((file, named) for named, file in re.findall(rf"`{name}`\s+in\s+`{path}`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_and_functions_that_exist(page: Path) -> None:
    for path, name in named_places(page.read_text(encoding="utf-8")):
        file = file_named(path)
        assert file, f"{page.name}: {path}"
        assert not name or name in names_in(file), f"{page.name}: {path}:{name}"


def test_the_page_parser_finds_every_notation() -> None:
    text = "`a/b.py:C.f` and `a/b.py`: `g`; `H`\nin `c.py`, `python -m d.py --x`"
    assert sorted(set(named_places(text))) == [
        ("a/b.py", ""), ("a/b.py", "C.f"), ("a/b.py", "g"), ("c.py", ""), ("c.py", "H"), ("d.py", ""),
    ]  # fmt: skip


@cache
def known_words() -> frozenset[str]:
    """Every word of the sources and parameter files."""
    others = [*ROOT.glob("*.yaml"), *(ROOT / "configs").rglob("*.yaml"), ROOT / "Makefile"]
    texts = (file.read_text(encoding="utf-8") for file in [*SOURCES, *others])
    return frozenset(word for text in texts for word in re.findall(r"\w+", text)) | {f.stem for f in SOURCES}


@pytest.mark.parametrize("page", WRITTEN_PAGES, ids=lambda page: page.name)
def test_pages_use_names_that_the_code_defines(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    names = {word for span in spans for word in re.findall(r"[A-Za-z_]\w*", span)}
    names = {name for name in names if "_" in name.strip("_") or re.search(r"[a-z][A-Z]", name)}
    assert names - known_words() - NOT_OURS == set()


def test_docstrings_and_comments_refer_to_existing_pages() -> None:
    missing = []
    for file in SOURCES:
        if file.is_relative_to(ROOT / "tests"):
            continue
        for page in re.findall(r"(?<![\w/{}>])((?:[\w-]+/)*[\w-]+\.md)\b(?!\.)", file.read_text(encoding="utf-8")):
            places = (base / page for base in (ROOT, ROOT / "docs", file.parent))
            if page not in WRITTEN_BY_RUNS and not any(place.is_file() for place in places):
                missing.append(f"{file.relative_to(ROOT)}: {page}")
    assert missing == []


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


def test_recipes_set_parameters_that_exist() -> None:
    keys = {spec.key for spec in field_specs(Params)}
    for page in PAGES:
        for key in re.findall(r"-S ([a-z][a-z0-9_.]*)=", page.read_text(encoding="utf-8")):
            assert key in keys or key == "key", f"{page.name}: {key}"


def class_of(file: Path, name: str) -> ast.ClassDef:
    return next(node for node in ast.walk(syntax(file)) if isinstance(node, ast.ClassDef) and node.name == name)


def test_the_python_page_names_existing_methods_and_objects() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    detector, detections = PACKAGE / "detector.py", PACKAGE / "detections.py"
    for owner, file, name in (("detector", detector, "Detector"), ("found", detections, "Detections")):
        assert {f"{name}.{method}" for method in re.findall(rf"\b{owner}\.(\w+)\(", page)} <= names_in(file)
    listed = re.findall(r"^\* \[`([\w.]+)`\]\(\.\./src/(.+)\)$", page, flags=re.MULTILINE)
    assert {"coordexp.detector.Detector", "coordexp.detections.Detections"} <= {name for name, _ in listed}
    for name, path in listed:  # docs/hooks.py puts their docstrings there
        module = path.removesuffix(".py").replace("/", ".")
        assert name == module or name.removeprefix(f"{module}.") in names_in(PACKAGE.parent / path), name


def test_docstrings_of_the_detector_tell_all_arguments_and_attributes() -> None:
    detector, detections = (class_of(PACKAGE / f"{n.lower()}.py", n) for n in ("Detector", "Detections"))
    for node in detector.body:
        if isinstance(node, ast.FunctionDef) and node.name in ("from_checkpoint", "predict"):
            told = re.findall(r"^ {4}(\w+): ", ast.get_docstring(node) or "", flags=re.MULTILINE)
            overload = any(isinstance(one, ast.Name) and one.id == "overload" for one in node.decorator_list)
            arguments = [argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs)]
            assert overload or set(arguments) <= set(told), node.name
    attributes = {node.target.id for node in detections.body if isinstance(node, ast.AnnAssign)}
    assert attributes <= set(re.findall(r"^ {4}(\w+): ", ast.get_docstring(detections) or "", flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = set(re.split(r"\s*\|\s*", syntax_doc(PACKAGE / "cli.py").split("`coordexp ")[1].split("`")[0]))
    assert set(re.findall(r"`coordexp ([a-z]+)", text)) <= commands  # those in fences run: tests/graph/test_commands.py
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    named = re.findall(r"python -m ((?:coordexp|pipelines)[\w.]+)", text)
    for name in named:
        base = ROOT if name.startswith("pipelines") else PACKAGE.parent
        assert (base / Path(*name.split("."))).with_suffix(".py").is_file(), f"{page.name}: {name}"


def syntax_doc(file: Path) -> str:
    return ast.get_docstring(syntax(file)) or ""
