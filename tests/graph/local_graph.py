"""The graph of the smoke profile in one process, by DVC's own rule: a stage runs if what it depends on has changed.

DVC itself would start an interpreter for each stage, which takes far longer than their work. The stages, what they
depend on and what they write are those of dvc.yaml.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from coordexp.config.loading import read_yaml
from coordexp.config.paths import CHECKPOINTS, RUN_METADATA
from coordexp.config.presets import changed_tree
from coordexp.infra.artefacts import HASHES
from coordexp.infra.files import remove
from coordexp.records.images import image_roots
from coordexp.stage import stage_main
from graph.test_graph import Node, graph

PROFILE = "smoke"
GIVEN = ("configs", "pipelines", "src")
SAYS_HOW = (RUN_METADATA, "decode.json", HASHES)  # hold the parameters themselves, or their hash, whatever came of them


@dataclass(slots=True)
class LocalGraph:
    """A folder with parameters, sources and results; `lock` holds what each stage last ran with, as dvc.lock does."""

    root: Path
    lock: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def new(cls, root: Path, repository: Path, changes: Mapping[str, Any]) -> LocalGraph:
        """Before its first run, with some keys of params.yaml changed."""
        ignored = shutil.ignore_patterns("__pycache__", "base")
        for folder in GIVEN:
            shutil.copytree(repository / folder, root / folder, ignore=ignored)
        for folder, name in (("data", "sprites"), ("models", "tiny-base")):
            (root / folder).mkdir()
            (root / folder / name).symlink_to(repository / folder / name)
        shutil.copy(repository / "params.yaml", root)
        made = cls(root)
        made.set({"profile": PROFILE} | dict(changes))
        return made

    def copy(self, root: Path) -> LocalGraph:
        """Another folder with the same content. Files are shared: stages replace files, they do not write into them."""
        shutil.copytree(self.root, root, symlinks=True, copy_function=os.link)
        return LocalGraph(root, {stage: dict(deps) for stage, deps in self.lock.items()})

    def set(self, changes: Mapping[str, Any]) -> None:
        """Change dotted keys of params.yaml."""
        path = self.root / "params.yaml"
        tree = changed_tree(read_yaml(path), changes, "params.yaml")
        path.unlink()  # it may be shared
        with path.open("w", encoding="utf-8") as out:
            YAML().dump(tree, out)

    def repro(self) -> dict[str, bool]:
        """Run what must run, in order; stage -> whether any of its outputs came out different."""
        image_roots.cache_clear()
        ran = {}
        for name, node in graph(PROFILE).items():
            deps = {path: content_hash(self.root / path) for path in node.deps}
            if name == "check":  # depends on all of both parameter files, and is cheap
                deps["params.yaml"] = content_hash(self.root / "params.yaml")
            if deps != self.lock.get(name):
                ran[name] = self._run(name, node)
                self.lock[name] = deps
        return ran

    def _run(self, name: str, node: Node) -> bool:
        before = {path: content_hash(self.root / path, SAYS_HOW) for path in node.outs}
        entry, _, which = name.partition("@")
        for path in node.outs:
            if name != "check":  # which persists
                remove(self.root / path)
        run = importlib.import_module(f"pipelines.{entry.replace('-', '_')}").run
        code = stage_main(run, [which] if which else [], CHECKPOINTS if which else ())
        assert code == 0, f"{name} ended with {code}"
        return {path: content_hash(self.root / path, SAYS_HOW) for path in node.outs} != before


def content_hash(path: Path, left_out: Collection[str] = ()) -> str:
    """Of a file, or of all files of a folder with their names; empty if there is nothing."""
    if path.is_file():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    ignored = {"__pycache__", *left_out}
    files = sorted(file for file in path.rglob("*") if file.is_file() and ignored.isdisjoint(file.parts))
    return " ".join(f"{file.relative_to(path)}:{content_hash(file)}" for file in files)
