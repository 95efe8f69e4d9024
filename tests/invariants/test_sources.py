"""Rules for all source files: each is checked in one pass over all files, with an example of a violation."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from source_tree import ROOT, modules, syntax

MODULE_LINES, ENTRY_LINES, FUNCTION_LINES = 450, 80, 60

# Modules that receive files and arguments of the user.
ENTRANCES = ("pipelines.", "coordexp.cli", "coordexp.detect", "coordexp.records.", "coordexp.infra.provenance",
             "coordexp.stage", "coordexp.models.loading",
             "coordexp.rollout.vllm_client", "coordexp.rollout.opening")  # fmt: skip
# Names of values that come from a file or command line.
FROM_USERS = {"path", "folder", "file", "row", "argv", "args", "params", "profile", "settings", "record"}
BROAD = {"Exception", "BaseException"}
# Where an incomplete file is harmless: the helpers themselves, a new folder each time, a private temporary folder.
WRITES_IN_PLACE = {"coordexp.infra.files", "coordexp.rollout.vllm_server"}
NETWORK = {"urllib", "http", "socket", "requests", "httpx", "httpx2", "aiohttp", "huggingface_hub", "ftplib", "smtplib"}
# Modules that may use the network, on request: the vLLM client talks to the servers in `rollout.servers` or `--server`
# and to its own; a model id downloads from the Hub, and `export --push` uploads; `--fetch` downloads images, and
# `make trees` and `make real` data sets.
TOLD_TO = {"coordexp.infra.download", "coordexp.rollout.vllm_http", "coordexp.rollout.vllm_server", "coordexp.detector",
           "coordexp.export.publish", "coordexp.records.fetched"}  # fmt: skip
CODE_IN_FILES = {"pickle", "dill", "joblib", "shelve", "marshal"}
# torch's unpickler raises its error class, and is only used for tensors.
ERROR_CLASS_ONLY = {"coordexp.training.checkpoint"}
PICTURE_READER = "coordexp.records.images"
SAFE_ARGUMENTS = {
    "from_pretrained": {"local_files_only": {"True"}, "trust_remote_code": {"False", None}},
    "torch.load": {"weights_only": {"True"}},
    "np.load": {"allow_pickle": {"False", None}},
}

# Python's parsers accept NaN, repeated keys and unpaired surrogates, and can end in a RecursionError. So text is parsed
# by the gates, except our own text: written or verified by this process, or part of the package.
PARSES = {
    "coordexp.infra.foreign", "coordexp.config.loading", "coordexp.records.sources.files",  # the gates
    "coordexp.rollout.vllm_reply", "coordexp.rollout.vllm_client", "coordexp.rollout.vllm_processor",  # of replies
    "coordexp.records.store", "coordexp.records.sources.grouped",  # temporary files of this process
    "coordexp.records.prediction_log", "coordexp.config.presets",  # what they have just dumped
    "coordexp.models.pins",  # a profile that was loaded before, for its comments
    "coordexp.training.state_files", "coordexp.training.checkpoint",  # behind a hash; words of our own processes
    "coordexp.training.stage1", "coordexp.rollout.scoring", "coordexp.rollout.stages",  # what a stage has written
    "coordexp.reporting.tables",  # of the package
}  # fmt: skip
PARSERS = {"json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.full_load"}

Rule = Callable[[ast.AST], Iterator[int]]


def assertions(tree: ast.AST) -> Iterator[int]:
    """Lines of `assert`."""
    return (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert))


def assertions_on_users(tree: ast.AST) -> Iterator[int]:
    """Lines of `assert` on a value from a user: such checks must work with `-O`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            names = {inner.id for inner in ast.walk(node.test) if isinstance(inner, ast.Name)}
            if names & FROM_USERS:
                yield node.lineno


def broad_handlers(tree: ast.AST) -> Iterator[int]:
    """Lines of `except:` and of handlers that catch every error, alone or in a tuple."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or (isinstance(kind, ast.Name) and kind.id in BROAD) for kind in caught):
                yield node.lineno


def writes_in_place(tree: ast.AST) -> Iterator[int]:
    """Lines of `.write_text(...)` and `.write_bytes(...)` on a path that is not from `with replacing(...)`."""
    items = [item for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items]
    temporary = {
        ast.unparse(item.optional_vars)
        for item in items
        if item.optional_vars and ast.unparse(item.context_expr).startswith("replacing(")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_write = node.func.attr in {"write_text", "write_bytes"}
            if is_write and ast.unparse(node.func.value) not in temporary:
                yield node.lineno


def imports_of(names: set[str]) -> Rule:
    """Lines that import one of these packages."""

    def rule(tree: ast.AST) -> Iterator[int]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = {node.module.split(".")[0]}
            else:
                continue
            if found & names:
                yield node.lineno

    return rule


def unsafe_loads(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that could download a model or run code from a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        for name, wanted in SAFE_ARGUMENTS.items():
            is_it = f".{ast.unparse(node.func)}".endswith(f".{name}")
            if is_it and any(given.get(argument) not in values for argument, values in wanted.items()):
                yield node.lineno


def picture_readers(tree: ast.AST) -> Iterator[int]:
    """Lines of `PIL.Image.open` under any name, and of image readers of other libraries."""
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


def bare_parsers(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that parse JSON or YAML directly."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            used = [node.func, *(node.args[:1] if ast.unparse(node.func) == "map" else [])]
            yield from (node.lineno for part in used if ast.unparse(part) in PARSERS)


def long_functions(tree: ast.AST) -> Iterator[int]:
    """Start lines of functions that are longer than their budget."""
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and (node.end_lineno or node.lineno) - node.lineno >= FUNCTION_LINES:
            yield node.lineno


# A failure in one section is a result, which must not stop the other sections.
EDGE_OF_SECTIONS = "benchmarks.gpu_check.run"


def files() -> dict[str, Path]:
    found = (ROOT / "benchmarks").rglob("*.py")
    return modules() | {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in found}


# Rule, the modules that it applies to, examples that violate it in their last line, and what to do instead.
RULES: dict[str, tuple[Rule, Callable[[str], bool], list[str], str]] = {
    "where users enter nothing is asserted": (
        assertions, lambda module: module.startswith(ENTRANCES), ["assert x"], "raise an error of errors.py"),
    "no value of a user is asserted": (
        assertions_on_users, lambda module: not module.startswith("benchmarks"),
        ["assert path.suffix == '.json'"], "raise an error of errors.py"),
    "a handler names what it catches": (
        broad_handlers, lambda module: module != EDGE_OF_SECTIONS,
        ["try: pass\nexcept: pass", "try: pass\nexcept Exception: pass",
         "try: pass\nexcept (ValueError, BaseException) as error: pass"], "name the errors"),
    "results are written whole or not at all": (
        writes_in_place, lambda module: module not in WRITES_IN_PLACE and not module.startswith("benchmarks"),
        ["with replacing(p) as t:\n    t.write_text('a')\n(folder / 'b').write_bytes(b'')"],
        "infra/files.py: write_text, write_bytes, replacing"),
    "only the vLLM client knows networks": (
        imports_of(NETWORK), lambda module: module not in TOLD_TO and not module.startswith("benchmarks"),
        ["import urllib.request", "from http import client"], "nothing is fetched unless told to"),
    "no file brings code with it": (
        imports_of(CODE_IN_FILES), lambda module: module not in ERROR_CLASS_ONLY, ["import pickle"], "no pickles"),
    "models come from local files and run no code of their own": (
        unsafe_loads, lambda module: not module.startswith("benchmarks"),
        ["A.from_pretrained(x)", "A.from_pretrained(x, local_files_only=True, trust_remote_code=True)",
         "torch.load(f)", "np.load(f, allow_pickle=True)"], "local_files_only=True, weights_only=True"),
    "pictures are opened in one place": (
        picture_readers, lambda module: module != PICTURE_READER,
        ["from PIL import Image\nImage.open(path)", "from PIL import Image as P\nread = P.open",
         "import PIL.Image as I\nI.open(path)", "from PIL.Image import open", "import cv2\ncv2.imread(path)"],
        f"{PICTURE_READER}: read_rgb, to_rgb or open_image"),
    "text of others is parsed behind a gate": (
        bare_parsers, lambda module: module.startswith("coordexp") and module not in PARSES,
        ["json.loads(text)", "rows = map(json.loads, lines)", "yaml = YAML(typ='safe')\nyaml.load(path)"],
        "infra/foreign.py: Gate"),
    "functions fit on a screen": (
        long_functions, lambda module: not module.startswith("benchmarks"),
        ["def f():\n" + "    x = 1\n" * FUNCTION_LINES], "split it"),
}  # fmt: skip
FINE = (
    "try: pass\nexcept (ValueError, KeyError): pass\npath.open()\nopen(path)\nImage.new('RGB', size)\n"
    "write_text(path, 'c')\nA.from_pretrained(x, local_files_only=True)\ntorch.load(f, weights_only=True)\n"
)


@pytest.mark.parametrize("name", RULES)
def test_sources_keep_the_rule(name: str) -> None:
    rule, applies, _, remedy = RULES[name]
    held = [module for module in sorted(files()) if applies(module)]
    assert len(held) > 20
    broken = [f"{module}:{line}" for module in held for line in rule(syntax(files()[module]))]
    assert broken == [], remedy


@pytest.mark.parametrize("name", RULES)
def test_each_rule_detects_its_example(name: str) -> None:
    rule, _, examples, _ = RULES[name]
    assert list(rule(ast.parse(FINE))) == []
    for code in examples:
        lines = list(rule(ast.parse(code)))
        assert len(lines) == 1, code


def test_files_keep_their_budgets() -> None:
    lines = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in modules().items()}
    budgets = {module: ENTRY_LINES if module.startswith("pipelines") else MODULE_LINES for module in lines}
    assert {module: n for module, n in lines.items() if n > budgets[module]} == {}


def test_the_image_reader_specifies_its_formats() -> None:
    calls = [node for node in ast.walk(syntax(modules()[PICTURE_READER])) if isinstance(node, ast.Call)]
    opened = [call for call in calls if ast.unparse(call.func) == "Image.open"]
    assert [[keyword.arg for keyword in call.keywords] for call in opened] == [["formats"]]
