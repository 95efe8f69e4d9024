"""Finished generations on disk as they come, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from pathlib import Path

import numpy as np

from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeSettings, Generation

log = logging.getLogger(__name__)


def request_key(sample: Sample, settings: DecodeSettings) -> str:
    """What decides an answer of given weights: picture, size, prompt and settings."""
    size = f"{sample.resized_width}x{sample.resized_height}"
    identity = f"{sample.image_id}:{sample.image}:{size}:{sample.prompt_ids.tolist()}:{settings}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


class Journal:
    """One JSON line per finished generation; safe to append to from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Generation]:
        """The finished generations by key. A last line that a crash cut short is dropped."""
        done: dict[str, Generation] = {}
        if not self._path.is_file():
            return done
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                log.warning("%s: a line was cut short; that answer is generated again", self._path)
                continue
            done[row["key"]] = Generation(np.array(row["ids"], np.int32), row["finish_reason"])
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


def _ends_mid_line(path: Path) -> bool:
    with path.open("rb") as handle:
        if handle.seek(0, 2) == 0:
            return False
        handle.seek(-1, 2)
        return handle.read(1) != b"\n"
