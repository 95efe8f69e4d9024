"""Storage of image bytes: one file per image, or shards with a thousand images each.

Tools that check every file of a folder (DVC, rsync, backups) need time per file, so composed images are written as
shards. The user's own images stay files.

    <root>/coordexp-shards.json   the shards of the folder, each with offset and sha256 of its directory
    <root>/train-000.zip, ...     uncompressed ZIP files; names are relative to the root, as for separate files

A shard is read without unpacking it: its directory has the offset of each image, and one `pread` reads it. Checks form
a chain, manifest -> list of shards -> directory -> CRC-32 of the image. So every reader of an image detects a
truncated, damaged or replaced shard, without hashing gigabytes first. No file stays open, so threads and forked
processes share no file position.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader, BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any

from coordexp.errors import DataError
from coordexp.infra.files import replacing
from coordexp.infra.foreign import Gate, open_regular
from coordexp.infra.provenance import file_hash, write_json
from coordexp.records.embedded import EMBEDDED, EmbeddedPicture, embedded_picture

MAX_FILE_BYTES = 2**31
INDEX = "coordexp-shards.json"
SHARD_PICTURES = 1000
RESTORE = "Restore it with `dvc checkout`, or make it again: dvc repro --force --single-item raw, then dvc repro."
SHARDS = Gate("the list of shards", DataError, RESTORE)
# The ZIP header before each file, and the entry per file in the directory at the end (APPNOTE.TXT 4.3.7 and 4.3.12).
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_DIRECTORY_ENTRY = struct.Struct("<4s6H3I5H2I")
_UNIX, _FILE_MODE, _EPOCH = 3, 0o644 << 16, (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Member:
    """One image in a shard: the offset of its header, its length and its CRC-32."""

    shard: Path
    name: str
    offset: int
    n_bytes: int
    crc32: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def read(self) -> bytes:
        """The bytes of the image; raises DataError if they do not match the shard's directory."""
        name = self.name.encode()
        begin = _LOCAL_HEADER.size + len(name)
        with _open_shard(self.shard) as handle:
            found = os.pread(handle.fileno(), begin + self.n_bytes, self.offset)
        content = found[begin:]
        if found[_LOCAL_HEADER.size : begin] != name or zlib.crc32(content) != self.crc32:
            raise _damaged(self.shard, f"{self.name} does not match its directory")
        return content


ImageSource = str | os.PathLike[str] | Member | EmbeddedPicture
ImageStream = BufferedReader | BytesIO


@contextmanager
def open_source(source: ImageSource) -> Iterator[ImageStream]:
    """Open the bytes of an image, wherever they are; raises OSError for a file that is not regular, or DataError."""
    if isinstance(source, Member | EmbeddedPicture):
        yield BytesIO(source.read())
    else:
        # Pillow gets the handle, not the path: given a path, it memory-maps a TIFF and mishandles orientations 5 to 8.
        with open_regular(source, MAX_FILE_BYTES) as handle:
            yield handle


def find_source(root: Path, name: str) -> ImageSource:
    """The image with this name below a root: in a shard or a parquet file, otherwise the file (which may be missing).

    Raises:
        DataError: the root has shards, and one of them is missing or damaged.
    """
    found = _members(root.absolute()).get(name)
    return found or (embedded_picture(root, name) if EMBEDDED in name else None) or root / name


def shards_hash(root: Path) -> str:
    """Hash of a folder's list of shards, which covers their whole content; empty for a folder of files."""
    index = root / INDEX
    return file_hash(index) if index.is_file() else ""


def write_shards(root: Path, pictures: Mapping[str, Iterable[tuple[str, bytes]]]) -> None:
    """Write the shards of a folder and their list; equal images give equal bytes.

    Args:
        root: the folder.
        pictures: prefix of shard names -> names (sorted) and contents of the images.
    """
    shards: dict[str, dict[str, Any]] = {}
    for prefix, named in pictures.items():
        left = iter(named)
        for number in count():
            batch = list(islice(left, SHARD_PICTURES))
            if not batch:
                break
            shard = f"{prefix}-{number:03d}.zip"
            shards[shard] = _write_shard(root / shard, batch)
    write_json(root / INDEX, shards)
    _members.cache_clear()


def _write_shard(path: Path, batch: list[tuple[str, bytes]]) -> dict[str, Any]:
    """Write one shard; returns its row in the list of shards."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in batch:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = _UNIX, _FILE_MODE
            archive.writestr(entry, content)
    begin = archive.start_dir
    with path.open("rb") as handle:
        handle.seek(begin)
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"pictures": len(batch), "directory_offset": begin, "directory_sha256": digest}


@lru_cache(maxsize=64)
def _members(root: Path) -> Mapping[str, Member]:
    """Name -> image, for all shards of a folder; empty for a folder of files. Cached per process."""
    index = root / INDEX
    if not os.path.lexists(index):
        return {}
    try:
        shards = SHARDS.read_object(index)
        rows = [(root / name, int(row["directory_offset"]), row["directory_sha256"]) for name, row in shards.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(index, f"expected the list of shards ({type(error).__name__}: {error})") from error
    return {m.name: m for path, begin, digest in rows for m in _directory(path, begin, digest)}


def _directory(path: Path, begin: int, digest: str) -> Iterator[Member]:
    with _open_shard(path) as handle:
        handle.seek(begin)
        found = handle.read()
    if hashlib.sha256(found).hexdigest() != digest:
        raise _damaged(path, "its directory does not match the list of shards")
    at = 0
    while found.startswith(b"PK\1\2", at):
        row = _DIRECTORY_ENTRY.unpack_from(found, at)
        crc32, n_bytes, n_name, n_more, offset = row[7], row[9], row[10], row[11] + row[12], row[16]
        at += _DIRECTORY_ENTRY.size
        yield Member(path, found[at : at + n_name].decode(), offset, n_bytes, crc32)
        at += n_name + n_more


@contextmanager
def _open_shard(path: Path) -> Iterator[BufferedReader]:
    try:
        with open_regular(path, None) as handle:
            yield handle
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such shard, but the {INDEX} next to it lists it. {RESTORE}") from error
    except OSError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: damaged, or changed since it was written: {reason}. {RESTORE}")
