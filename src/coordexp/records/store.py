"""Records in a temporary file: a sequence of them of any length, in the memory of their places."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, overload

from coordexp.records.schema import ObjectRecord, Record

BUFFER_BYTES = 1 << 24


class RecordStore(Sequence[Record]):
    """Records in the order in which they were added; up to `BUFFER_BYTES` of them stay in memory."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._ends = array("Q")
        self._file: IO[bytes] | None = None
        self._n_written = 0
        self._buffer = bytearray()
        self.extend(records)

    def append(self, record: Record) -> None:
        """Add a record."""
        self._buffer += _encoded(record)
        self._ends.append(self._n_written + len(self._buffer))
        if len(self._buffer) > BUFFER_BYTES:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
            self._file.write(self._buffer)
            self._file.flush()
            self._n_written += len(self._buffer)
            self._buffer.clear()

    def extend(self, records: Iterable[Record]) -> None:
        """Add records."""
        for record in records:
            self.append(record)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        begin, end = self._ends[place - 1] if place else 0, self._ends[place]
        if begin >= self._n_written or self._file is None:
            return _decoded(self._buffer[begin - self._n_written : end - self._n_written])
        return _decoded(os.pread(self._file.fileno(), end - begin, begin))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _encoded(record: Record) -> bytes:
    """All of a record, exactly: the contract's form rounds."""
    objects = [[o.desc, o.bbox_xyxy_px, o.poly_px, o.metadata, o.area_px2] for o in record.objects]
    row = [record.image, record.width, record.height, objects, record.summary, record.metadata]
    return json.dumps(row, separators=(",", ":")).encode()


def _decoded(content: bytes | bytearray) -> Record:
    image, width, height, objects, summary, metadata = json.loads(content)
    return Record(image, width, height, tuple(map(_object, objects)), summary, metadata)


def _object(row: list[Any]) -> ObjectRecord:
    desc, box, poly, metadata, area_px2 = row
    return ObjectRecord(desc, tuple(box), None if poly is None else tuple(poly), metadata, area_px2)
