"""The graph of the smoke profile in one process, with DVC's rule: a stage runs if one of its dependencies changed.

DVC itself starts an interpreter per stage, which takes much longer than the work. Stages, dependencies and outputs are
those of dvc.yaml.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordexp.config.paths import CHECKPOINTS, RUN_METADATA
from coordexp.infra.artefacts import HASHES
from coordexp.infra.files import remove
from coordexp.records.images import image_roots
from coordexp.stage import stage_main
from graph.test_graph import Node, graph
from read_keys import Key, recording
from workspaces import PROFILE, change_yaml, content_hash, copy_workspace, new_workspace

SAYS_HOW = (
    RUN_METADATA,
    "decode.json",
    HASHES,
)  # contain the parameters themselves or their hash, so they always differ


@dataclass(slots=True)
class LocalGraph:
    """A folder with parameters, sources and results; like dvc.lock, `lock` records the inputs of the last runs.

    `read` has the keys that each stage read in recorded runs.
    """

    root: Path
    lock: dict[str, dict[str, str]] = field(default_factory=dict)
    read: dict[str, set[Key]] = field(default_factory=dict)

    @classmethod
    def new(cls, root: Path, changes: Mapping[str, Any]) -> LocalGraph:
        """The graph before its first run, with some keys of params.yaml changed."""
        new_workspace(root, changes, {})
        return cls(root)

    def copy(self, root: Path) -> LocalGraph:
        """Another folder with the same content."""
        copy_workspace(self.root, root)
        return LocalGraph(root, {stage: dict(deps) for stage, deps in self.lock.items()})

    def set(self, changes: Mapping[str, Any]) -> None:
        """Change dotted keys of params.yaml."""
        change_yaml(self.root / "params.yaml", changes)

    def repro(self, recorded: bool = False) -> dict[str, bool]:
        """Run the outdated stages in order; returns stage -> whether any of its outputs changed."""
        image_roots.cache_clear()
        ran = {}
        for name, node in graph(PROFILE).items():
            deps = {path: content_hash(self.root / path) for path in node.deps}
            if name == "check":  # depends on all of both parameter files, and is cheap
                deps["params.yaml"] = content_hash(self.root / "params.yaml")
            if deps != self.lock.get(name):
                ran[name] = self._run(name, node, recorded)
                self.lock[name] = deps
        return ran

    def _run(self, name: str, node: Node, recorded: bool) -> bool:
        before = {path: content_hash(self.root / path, SAYS_HOW) for path in node.outs}
        entry, _, which = name.partition("@")
        for path in node.outs:
            if name != "check":  # which persists
                remove(self.root / path)
        run = importlib.import_module(f"pipelines.{entry.replace('-', '_')}").run
        with recording() if recorded else nullcontext() as recorder:
            asked = recorder.run(run) if recorder else run
            code = stage_main(asked, [which] if which else [], CHECKPOINTS if which else ())
        if recorder:
            self.read.setdefault(entry, set()).update(recorder.keys)
        assert code == 0, f"{name} ended with {code}"
        return {path: content_hash(self.root / path, SAYS_HOW) for path in node.outs} != before
