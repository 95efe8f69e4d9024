"""The origin of a result, and the fingerprint that keys resume states.

What determines a result is hashed with it: `run_metadata.json` in a checkpoint holds settings and inputs. Clock,
machine and commit determine nothing: they are in the run record next to the outputs, so that equal runs leave equal
bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from coordexp.infra.artefacts import file_sha256
from coordexp.infra.files import write_text
from coordexp.infra.foreign import strict_json

# A run of the graph rewrites these files, so changes in them do not mean changed code or parameters.
WRITTEN_BY_STAGES = ("dvc.lock", "inputs", "reports")
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pillow", "pycocotools", "dvc")
# All files besides the weights that loading a checkpoint or rendering a prompt may read.
ANSWER_FILES = (
    "config.json",
    "coordexp.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def file_hash(path: Path) -> str:
    """First 16 hex digits of the sha256 of a file."""
    return file_sha256(path)[:16]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder; large models have several."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def answer_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that determine its answers, sorted by name."""
    return sorted(path for path in folder.glob("*") if decides_answer(path.name) and path.is_file())


def decides_answer(name: str) -> bool:
    """Whether a file of this name in a checkpoint folder determines its answers."""
    return name in ANSWER_FILES or (name.endswith(".safetensors") and not name.startswith("."))


def fingerprint(settings: Mapping[str, Any], inputs: Iterable[Path]) -> str:
    """12 hex digits over a stage's settings and the contents of its input files: the key of its resume state.

    It must cover everything that changes what a step computes: a run must never resume from the state of another run.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in sorted(inputs):
        digest.update(f"{path.name}:{file_hash(path)}".encode())
    return digest.hexdigest()[:12]


def image_inputs(raw: Path) -> dict[str, Path]:
    """The file of the raw stage that represents all images, if it wrote one."""
    manifest = raw / "manifest.json"
    return {"images": manifest} if manifest.is_file() else {}


def run_metadata(
    stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Path], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings, input hashes and counts of one run; independent of time and machine."""
    return {
        "stage": stage,
        "settings": dict(settings),
        "inputs": {name: file_hash(path) for name, path in inputs.items()},
        **extra,
    }


def add_to_run_record(path: Path, facts: Mapping[str, Any]) -> None:
    """Add to the record of a run, or create it (`ProfilePaths.run_record`)."""
    write_json(path, read_run_record(path) | dict(facts))


def read_run_record(path: Path) -> dict[str, Any]:
    """The record of a run; empty if the stage did not run here, or the file is not a JSON object."""
    try:
        record = strict_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def run_facts(stage: str, wall_seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """The facts that `stage_main` records about a finished run: commit, versions, machine, wall time and CPU time."""
    return {
        "stage": stage,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(wall_seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "git": git_state(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "system": platform.system()},
    }


def git(*arguments: str) -> str | None:
    """The stripped output of a git command; None if it fails or git is not installed."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it (files that stages write aside); null outside a checkout."""
    written = [f":(exclude,top){path}" for path in WRITTEN_BY_STAGES]
    status = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, atomically; creates parent folders."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
