"""Images embedded in the rows of a parquet file, as in data sets of the Hugging Face Hub.

They are not extracted: a record refers to one as `<file>.parquet/<row>`. Reading it decodes its row group, usually a
hundred images; the last few groups are cached.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SUFFIX = ".parquet"
EMBEDDED = f"{SUFFIX}/"  # part of the name of each such image
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")
KEPT_GROUPS = 4


@dataclass(frozen=True, slots=True)
class EmbeddedPicture:
    """A row of a parquet file whose image column holds the bytes of an image."""

    file: Path
    row: int

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}"

    def read(self) -> bytes:
        """The bytes of the image; raises OSError if the file is invalid or has no image in this row."""
        stat = self.file.stat()
        version = (stat.st_size, stat.st_mtime_ns)
        try:
            column, ends = _layout(self.file, version)
            group = bisect_right(ends, self.row)
            if group >= len(ends):
                raise OSError(f"it has {ends[-1] if ends else 0} rows")
            begin = ends[group - 1] if group else 0
            content = _group(self.file, version, group, column)[self.row - begin].as_py()
        except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
            raise OSError(f"not a parquet file with images ({error})") from error
        if not isinstance(content, bytes):
            raise OSError("the row has no image")
        return content


def embedded_picture(root: Path, name: str) -> EmbeddedPicture | None:
    """The image, if the name means a row of a parquet file below the root; otherwise None."""
    file, _, row = name.rpartition("/")
    if file.endswith(SUFFIX) and row.isascii() and row.isdigit() and len(row) < 12 and os.path.isfile(root / file):
        return EmbeddedPicture(root / file, int(row))
    return None


def picture_column(schema: pa.Schema) -> str | None:
    """The column with the image bytes, in parquet's notation: `image.bytes`, or `image` itself."""
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return f"{name}.bytes"
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
    return None


@lru_cache(maxsize=1024)
def _layout(file: Path, version: tuple[int, int]) -> tuple[str, list[int]]:
    """The image column, and the end row of each row group."""
    with pq.ParquetFile(file) as table:
        column = picture_column(table.schema_arrow)
        if column is None:
            raise KeyError("no image column")
        sizes: Iterable[int] = (table.metadata.row_group(i).num_rows for i in range(table.num_row_groups))
        return column, list(accumulate(sizes))


@lru_cache(maxsize=KEPT_GROUPS)
def _group(file: Path, version: tuple[int, int], group: int, column: str) -> pa.ChunkedArray:
    with pq.ParquetFile(file) as table:
        found = table.read_row_group(group, columns=[column])
    values = found.column(0)
    return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values
