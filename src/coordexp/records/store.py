"""Records in a temporary file: a sequence of any length; only the offsets are in memory.

Parsing dominates the time of a pass over millions of records. Code that needs only names therefore reads only these,
and code that needs whole records distributes them to processes (`map_records`), which read the parent's file.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar, overload

from coordexp.infra.workers import map_batches
from coordexp.records.schema import ObjectRecord, Record

R = TypeVar("R")
BUFFER_BYTES = 1 << 24
_DECODER = json.JSONDecoder()


class RecordStore(Sequence[Record]):
    """Records in insertion order; up to `BUFFER_BYTES` of them stay in memory."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._ends = array("Q")
        self._file: IO[bytes] | None = None
        self._n_written = 0
        self._buffer = bytearray()
        self.extend(records)

    def append(self, record: Record) -> None:
        """Add a record."""
        self._append(_encoded(record))

    def _append(self, content: bytes | bytearray) -> None:
        self._buffer += content
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
        if isinstance(records, RecordStore):
            begin = 0
            for end in records._ends:
                self._append(records._read(begin, end))
                begin = end
        else:
            for record in records:
                self.append(record)

    def taken(self, places: Iterable[int]) -> RecordStore:
        """The records at these indices."""
        result = RecordStore()
        for place in places:
            result._append(self._content(place))
        return result

    def images(self) -> Iterator[str]:
        """The image name of each record."""
        return (image for image, _ in self.heads())

    def heads(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The image name and the metadata of each record."""
        for place in range(len(self)):
            text = self._content(place).decode()
            image, end = _DECODER.raw_decode(text, 1)  # after the opening bracket
            yield image, _DECODER.raw_decode(text, end + 1)[0]

    def map_records(self, work: Callable[[list[Record]], R], workers: int) -> Iterator[R]:
        """Apply `work` to batches of the records and yield the results in order; see `map_batches`."""
        return map_batches(lambda places: work([self[i] for i in places]), range(len(self)), workers)

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling, to send records to another process."""
        return _of_content, (self._ends, bytes(self._read(0, self._ends[-1] if self._ends else 0)))

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
        return _decoded(self._content(place))

    def _content(self, place: int) -> bytes | bytearray:
        return self._read(self._ends[place - 1] if place else 0, self._ends[place])

    def _read(self, begin: int, end: int) -> bytes | bytearray:
        """The bytes between two offsets: from the file and, after its end, from the buffer."""
        n = self._n_written
        if begin >= n or self._file is None:
            return self._buffer[begin - n : end - n]
        return os.pread(self._file.fileno(), min(end, n) - begin, begin) + self._buffer[: max(0, end - n)]

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _of_content(ends: array[int], content: bytes) -> RecordStore:
    store, begin = RecordStore(), 0
    for end in ends:
        store._append(content[begin:end])
        begin = end
    return store


def _encoded(record: Record) -> bytes:
    """The complete record, not rounded as in the contract's JSON form; the parts that `heads` reads come first."""
    objects = [[o.desc, o.bbox_xyxy_px, o.poly_px, o.metadata, o.area_px2] for o in record.objects]
    row = [record.image, record.metadata, record.width, record.height, objects, record.summary]
    return json.dumps(row, separators=(",", ":")).encode()


def _decoded(content: bytes | bytearray) -> Record:
    image, metadata, width, height, objects, summary = json.loads(content)
    return Record(image, width, height, tuple(map(_object, objects)), summary, metadata)


def _object(row: list[Any]) -> ObjectRecord:
    desc, box, poly, metadata, area_px2 = row
    return ObjectRecord(desc, tuple(box), None if poly is None else tuple(poly), metadata, area_px2)
