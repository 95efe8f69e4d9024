"""Saved states on disk: tensors by rows in safetensors files, one of each writing process, and a manifest of hashes.

    state-000120/part-000.safetensors   what process 0 holds: rows of sharded tensors, all of the others
    state-000120/part-001.safetensors   likewise of process 1; only if the model is sharded
    state-000120/state.json             written last: the facts, the sha256 of every part, and one of itself

A folder gets its name when all of it is on disk. Rows are found again whatever wrote them, so any number of processes
reads what any other number saved, and each of them only the rows that it needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coordexp.errors import CheckpointError
from coordexp.infra.files import os_error, sync, write_text
from coordexp.infra.provenance import file_sha256

MANIFEST = "state.json"
_GENERATIONS = "state-*"
_ROWS = "rows"  # key in the header of a part


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a tensor, counted from 0 along its first dimension; a scalar is its own only row."""

    values: Tensor
    first: int
    shape: tuple[int, ...]  # of the whole tensor


def generation_name(step: int) -> str:
    """Name of the folder of the state from which `step` runs next."""
    return f"state-{step:06d}"


def generations(folder: Path) -> list[Path]:
    """The saved states of a run, newest first, whatever their condition."""
    return sorted(folder.glob(_GENERATIONS), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def write_part(folder: Path, rank: int, held: Mapping[str, Rows]) -> dict[str, str]:
    """Write what one process holds; returns the sha256 by file name, nothing if it holds nothing.

    Raises:
        OSError: the disk is full or not writable.
    """
    if not held:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{rank:03d}.safetensors"
    rows = {name: [part.first, *part.shape] for name, part in held.items()}
    try:
        save_file({name: part.values for name, part in held.items()}, path, {_ROWS: json.dumps(rows)})
    except SafetensorError as error:
        raise os_error(error, path) from error
    sync(path)
    return {path.name: file_sha256(path)}


def write_manifest(folder: Path, facts: Mapping[str, Any], parts: Mapping[str, str]) -> None:
    """Write the manifest, which makes a state of the parts."""
    content = {"facts": dict(facts), "parts": dict(parts)}
    write_text(folder / MANIFEST, json.dumps({"content": content, "sha256": _digest(content)}, indent=1) + "\n")


def read_manifest(folder: Path) -> SavedState:
    """The facts of a state; its parts are not looked at yet.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        content = tree["content"]
        intact = tree["sha256"] == _digest(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, expected the manifest that is written last.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not what was written ({error!r}); expected JSON with its hash.") from error
    if not intact:
        raise CheckpointError(f"{path}: its content does not have the sha256 that it records.")
    return SavedState(folder, content["facts"], content["parts"])


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class SavedState:
    """One saved state: its facts, and tensors that are read from the parts when they are asked for."""

    folder: Path
    facts: Mapping[str, Any]
    parts: Mapping[str, str]  # sha256 by file name
    _files: dict[str, Any] = field(default_factory=dict, repr=False)

    def verify(self, names: Sequence[str]) -> None:
        """Raise CheckpointError unless these parts are the ones that were written."""
        for name in names:
            path = self.folder / name
            try:
                found = file_sha256(path)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
            if found != self.parts[name]:
                raise CheckpointError(f"{path}: sha256 {found[:16]}, but {MANIFEST} records {self.parts[name][:16]}.")

    def names(self, area: str) -> list[str]:
        """Tensors below `area/`, without it."""
        return sorted(name.removeprefix(f"{area}/") for name in self._index if name.startswith(f"{area}/"))

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """A tensor on the CPU, or `count` of its rows from `first` on."""
        shape, places = self._index[name]
        if not shape:
            return self._open(places[0][1]).get_tensor(name).clone()  # a view would keep the file
        end = shape[0] if count is None else first + count
        pieces = [
            self._open(part).get_slice(name)[max(first, start) - start : min(end, start + rows) - start]
            for start, part, rows in places
            if start < end and first < start + rows
        ]
        found = torch.cat(pieces) if len(pieces) != 1 else pieces[0].clone()
        assert len(found) == end - first, f"{self.folder}: {name} is not whole"
        return found

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a whole tensor; None if there is none of this name."""
        return self._index[name][0] if name in self._index else None

    @cached_property
    def _index(self) -> dict[str, tuple[tuple[int, ...], list[tuple[int, str, int]]]]:
        """By tensor: its shape, and the first row, the part and the number of rows of each piece."""
        index: dict[str, tuple[tuple[int, ...], list[tuple[int, str, int]]]] = {}
        for part in sorted(self.parts):
            for name, (first, *shape) in json.loads(self._open(part).metadata()[_ROWS]).items():
                rows = self._open(part).get_slice(name).get_shape()[0] if shape else 1
                index.setdefault(name, (tuple(shape), []))[1].append((first, part, rows))
        return {name: (shape, sorted(places)) for name, (shape, places) in index.items()}

    def close(self) -> None:
        """Let go of the files, which take their room on the disk as long as they are held."""
        self._files.clear()

    def _open(self, part: str) -> Any:  # safetensors has no types
        if part not in self._files:
            self._files[part] = safe_open(self.folder / part, "pt")
        return self._files[part]
