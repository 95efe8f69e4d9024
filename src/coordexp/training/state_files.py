"""Saved states on disk: tensors by rows in safetensors files, one file per writing process, and their hashes.

    state-000120/part-000.safetensors   from process 0: its rows of sharded tensors, and all other tensors
    state-000120/part-001.safetensors   from process 1: its rows; only if the model is sharded
    state-000120/facts.json             everything that is not a tensor
    state-000120/coordexp.sha256        written last: the hashes of these files (infra/artefacts.py)

A folder gets its final name when it is complete on disk. An index maps each tensor to the parts that hold its rows, so
any number of processes can read a state that any other number saved, and each reads only the rows that it needs.
"""

from __future__ import annotations

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

from coordexp.errors import DamagedArtefactError
from coordexp.infra.artefacts import HashList, file_sha256, read_hashes, write_hashes
from coordexp.infra.files import os_error, sync
from coordexp.infra.foreign import Gate
from coordexp.infra.provenance import write_json

FACTS = "facts.json"
_FACTS = Gate("the facts of a saved state", DamagedArtefactError, "")
_GENERATIONS = "state-*"
_ROWS = "rows"  # key in the header of a part


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a tensor, counted from 0 along its first dimension; a scalar is a single row."""

    values: Tensor
    first: int
    shape: tuple[int, ...]  # of the whole tensor


def generation_name(step: int) -> str:
    """The folder name of the state from which `step` runs next."""
    return f"state-{step:06d}"


def generations(folder: Path) -> list[Path]:
    """The saved states of a run, newest first, including damaged ones."""
    return sorted(folder.glob(_GENERATIONS), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def write_part(folder: Path, rank: int, held: Mapping[str, Rows]) -> dict[str, str]:
    """Write the rows of one process; returns the sha256 by file name, empty if it has no rows.

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


def publish_state(folder: Path, facts: Mapping[str, Any], parts: Mapping[str, str]) -> None:
    """Write facts and hashes, which turn the parts into a complete state."""
    write_json(folder / FACTS, dict(facts))
    write_hashes(folder, {**parts, FACTS: file_sha256(folder / FACTS)})


def open_state(folder: Path) -> SavedState:
    """Open a state and read its facts, without reading its parts.

    Raises:
        DamagedArtefactError: hashes or facts are missing or damaged.
    """
    hashes = read_hashes(folder)
    if hashes is None:
        raise DamagedArtefactError(f"{folder}: the list of hashes, which is written last, is missing.")
    hashes.check(FACTS)
    return SavedState(folder, _FACTS.read_object(folder / FACTS), hashes)


@dataclass(frozen=True)
class SavedState:
    """One saved state: its facts, and tensors that are read from the parts on demand."""

    folder: Path
    facts: Mapping[str, Any]
    hashes: HashList
    _files: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def parts(self) -> list[str]:
        """The names of the files with tensors."""
        return sorted(name for name in self.hashes.digests if name != FACTS)

    def verify(self, names: Sequence[str]) -> None:
        """Raise DamagedArtefactError unless these parts match their hashes."""
        for name in names:
            self.hashes.check(name)

    def names(self, area: str) -> list[str]:
        """The names of tensors below `area/`, without that prefix."""
        return sorted(name.removeprefix(f"{area}/") for name in self._index if name.startswith(f"{area}/"))

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """A tensor on the CPU, or `count` of its rows starting at `first`."""
        shape, places = self._index[name]
        if not shape:
            return self._open(places[0][1]).get_tensor(name).clone()  # a view would keep the file open
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
        """The shape of a whole tensor; None if there is no tensor of this name."""
        return self._index[name][0] if name in self._index else None

    @cached_property
    def _index(self) -> dict[str, tuple[tuple[int, ...], list[tuple[int, str, int]]]]:
        """Tensor name -> its shape, and first row, part and number of rows of each piece."""
        index: dict[str, tuple[tuple[int, ...], list[tuple[int, str, int]]]] = {}
        for part in self.parts:
            for name, (first, *shape) in json.loads(self._open(part).metadata()[_ROWS]).items():
                rows = self._open(part).get_slice(name).get_shape()[0] if shape else 1
                index.setdefault(name, (tuple(shape), []))[1].append((first, part, rows))
        return {name: (shape, sorted(places)) for name, (shape, places) in index.items()}

    def close(self) -> None:
        """Close the files: deleted ones occupy disk space as long as they are open."""
        self._files.clear()

    def _open(self, part: str) -> Any:  # safetensors has no types
        if part not in self._files:
            self._files[part] = safe_open(self.folder / part, "pt")
        return self._files[part]
