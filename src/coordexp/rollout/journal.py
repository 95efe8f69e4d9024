"""Finished generations on disk as they come, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from pathlib import Path

from coordexp.errors import DataError
from coordexp.infra.provenance import file_hash
from coordexp.packing.samples import Sample
from coordexp.records.images import image_path, split_view
from coordexp.rollout.engine import DecodeSettings, Generation

log = logging.getLogger(__name__)


def request_key(sample: Sample, settings: DecodeSettings, image_root: Path) -> str:
    """What decides an answer of given weights: the picture's name and bytes, its size, prompt and settings.

    Raises:
        DataError: the picture cannot be read.
    """
    path = image_path(image_root, split_view(sample.image)[0])
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the image of a sample. Run the raw stage.")
    try:
        content = file_hash(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected the image of a sample.") from error
    size = f"{sample.resized_width}x{sample.resized_height}"
    identity = f"{sample.image_id}:{sample.image}:{content}:{size}:{sample.prompt_ids.tolist()}:{settings}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


class Journal:
    """One JSON line per finished generation; safe to append to from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self, vocabulary_size: int) -> dict[str, Generation]:
        """The finished generations by key. Damaged lines are dropped: what they answered is generated again."""
        done: dict[str, Generation] = {}
        if not self._path.is_file():
            return done
        damaged = []
        for number, line in enumerate(self._path.read_bytes().splitlines(), 1):
            try:
                key, generation = _finished(line, vocabulary_size)
            except (ValueError, RecursionError) as error:
                damaged.append(f"line {number}: {error}")
                continue
            done[key] = generation
        if damaged:
            log.warning(
                "%s: %d damaged lines, whose answers are generated again; the first is %s",
                self._path,
                len(damaged),
                damaged[0],
            )
        return done

    def append(self, key: str, generation: Generation) -> None:
        """Add a finished generation; it is on disk when this returns."""
        row = {"key": key, "ids": generation.ids.tolist(), "finish_reason": generation.finish_reason}
        with self._lock, self._path.open("a", encoding="utf-8") as out:
            # A cut line of an earlier run must not swallow this one.
            out.write(("\n" if _ends_mid_line(self._path) else "") + json.dumps(row) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def remove(self) -> None:
        """Forget everything: the run is complete."""
        self._path.unlink(missing_ok=True)


def _finished(line: bytes, vocabulary_size: int) -> tuple[str, Generation]:
    """Key and generation of a line; raises ValueError if it is none that `append` wrote for this vocabulary."""
    row = json.loads(line)
    if not isinstance(row, dict) or row.keys() != {"key", "ids", "finish_reason"} or not isinstance(row["key"], str):
        raise ValueError("it is no object of key, ids and finish_reason")
    return row["key"], Generation.from_json(row["ids"], row["finish_reason"], vocabulary_size)


def _ends_mid_line(path: Path) -> bool:
    with path.open("rb") as handle:
        if handle.seek(0, 2) == 0:
            return False
        handle.seek(-1, 2)
        return handle.read(1) != b"\n"
