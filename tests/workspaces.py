"""Folders in which stages run without git and DVC: sources, parameters, sprites and base model of this repository."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from coordexp.config.loading import read_yaml
from coordexp.config.presets import changed_tree

REPOSITORY = Path(__file__).parents[1]
PROFILE = "smoke"
# Changes to that profile: few images with few objects, memorized in twelve steps, with a state saved after each step.
ANSWERING: Mapping[str, Any] = {
    "source.train_images": 12,
    "source.val_images": 4,
    "source.max_objects": 2,
    "source.small_fraction": 0.0,
    "source.crowd_fraction": 0.0,
    "records.dev_images": 4,
    "stage1.steps": 12,
    "monitor.every_steps": 6,
    "eval.images": 4,
    "launch.save_every_seconds": 0.0,
}


def new_workspace(root: Path, params: Mapping[str, Any], profile: Mapping[str, Any]) -> None:
    """Before the first run, with some dotted keys of params.yaml and of the profile changed."""
    for folder in ("configs", "pipelines", "src"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "base"))
    for folder, name in (("data", "sprites"), ("models", "tiny-base")):
        (root / folder).mkdir()
        (root / folder / name).symlink_to(REPOSITORY / folder / name)
    shutil.copy(REPOSITORY / "params.yaml", root)
    change_yaml(root / "params.yaml", {"profile": PROFILE} | dict(params))
    change_yaml(root / "configs" / f"{PROFILE}.yaml", profile)


def change_yaml(path: Path, changes: Mapping[str, Any]) -> None:
    """Change dotted keys of a parameter file, which is replaced: it may be shared with a copy."""
    tree = changed_tree(read_yaml(path), changes, path.name)
    path.unlink()
    with path.open("w", encoding="utf-8") as out:
        YAML().dump(tree, out)


def copy_workspace(source: Path, target: Path) -> None:
    """Another folder with the same content. Files are shared: stages replace files instead of modifying them."""
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)


def content_hash(path: Path, left_out: Collection[str] = ()) -> str:
    """Hash of a file, or of all files in a folder with their names; empty if nothing exists."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    ignored = {"__pycache__", *left_out}
    files = sorted(file for file in path.rglob("*") if file.is_file() and ignored.isdisjoint(file.parts))
    return " ".join(f"{file.relative_to(path)}:{content_hash(file)}" for file in files)
