"""Group the rows of a file by image in bounded memory (an external bucket sort).

Rows stay JSON text until `rows_of` parses them, so that worker processes can do the parsing.

Annotations of an image may be anywhere in a file. They are collected in buckets of neighboring images; beyond the
memory limit, buckets are written to temporary files and read back one at a time.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import IO, Any

BUFFER_BYTES = 1 << 25
BUCKET_GROUPS = 10_000  # images per bucket


class Grouped:
    """Rows by group number; iteration yields the groups in the order of their numbers."""

    def __init__(self, buffer_bytes: int | None = None, bucket_groups: int | None = None) -> None:
        self._limit = BUFFER_BYTES if buffer_bytes is None else buffer_bytes
        self._groups = BUCKET_GROUPS if bucket_groups is None else bucket_groups
        self._waiting: defaultdict[int, list[str]] = defaultdict(list)
        self._files: dict[int, IO[str]] = {}
        self._n_waiting = 0

    def add(self, group: int, row: Any) -> None:
        """Add a row to its group."""
        text = f"{group}\t{json.dumps(row)}"
        self._waiting[group // self._groups].append(text)
        self._n_waiting += len(text) + 64
        if self._n_waiting > self._limit:
            self._flush()

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Yield each non-empty group with the texts of its rows in insertion order."""
        for bucket in sorted(self._waiting.keys() | self._files.keys()):
            found: defaultdict[int, list[str]] = defaultdict(list)
            for text in self._texts(bucket):
                number, _, row = text.partition("\t")
                found[int(number)].append(row)
            for group in sorted(found):
                yield group, found.pop(group)

    def _texts(self, bucket: int) -> Iterator[str]:
        if bucket in self._files:
            file = self._files[bucket]
            file.seek(0)
            yield from file
            file.seek(0, 2)
        yield from self._waiting.get(bucket, ())

    def _flush(self) -> None:
        for bucket, texts in self._waiting.items():
            if bucket not in self._files:
                self._files[bucket] = tempfile.TemporaryFile("w+", encoding="ascii")  # noqa: SIM115
            self._files[bucket].writelines(f"{text}\n" for text in texts)
        self._waiting.clear()
        self._n_waiting = 0


def rows_of(texts: Iterable[str]) -> list[Any]:
    """Parse the texts of a group into the rows that were added."""
    return [json.loads(text) for text in texts]
