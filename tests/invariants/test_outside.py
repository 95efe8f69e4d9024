"""Nothing is fetched from a network unless told to, and no file can bring code with it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from source_tree import modules, syntax

NETWORK = {"urllib", "http", "socket", "requests", "httpx", "aiohttp", "huggingface_hub", "ftplib", "smtplib"}
# The vLLM client talks to the servers that `rollout.servers` or `--server` names, and to its own.
TOLD_TO = {"coordexp.rollout.vllm_http", "coordexp.rollout.vllm_server"}
CODE_IN_FILES = {"pickle", "dill", "joblib", "shelve", "marshal"}
# torch's unpickler raises its error class, and is only ever asked for tensors (below).
ERROR_CLASS_ONLY = {"coordexp.training.checkpoint"}


def imported(tree: ast.AST) -> Iterator[str]:
    """First names of all imported modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def calls(tree: ast.AST, name: str) -> Iterator[dict[str, str]]:
    """Keyword arguments, as source text, of every call whose function is written `name` or ends in `.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and f".{ast.unparse(node.func)}".endswith(f".{name}"):
            yield {keyword.arg or "**": ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("module", sorted(modules().keys() - TOLD_TO))
def test_only_the_vllm_client_knows_networks(module: str) -> None:
    assert NETWORK & set(imported(syntax(modules()[module]))) == set()


@pytest.mark.parametrize("module", sorted(modules()))
def test_models_come_from_local_files_and_run_no_code_of_their_own(module: str) -> None:
    tree = syntax(modules()[module])
    for keywords in calls(tree, "from_pretrained"):
        assert keywords.get("local_files_only") == "True"
        assert keywords.get("trust_remote_code", "False") == "False"
    for keywords in calls(tree, "torch.load"):
        assert keywords.get("weights_only") == "True"
    for keywords in calls(tree, "np.load"):
        assert keywords.get("allow_pickle", "False") == "False"
    if module not in ERROR_CLASS_ONLY:
        assert CODE_IN_FILES & set(imported(tree)) == set()


def test_what_the_readers_see() -> None:
    tree = ast.parse("import urllib.request\nfrom http import client\nAuto.from_pretrained(x, local_files_only=True)\n")
    assert set(imported(tree)) == {"urllib", "http"}
    assert list(calls(tree, "from_pretrained")) == [{"local_files_only": "True"}]
