"""Images given as URLs: downloaded only on request, completely, and within limits of size and time."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TypeGuard
from urllib.parse import unquote, urlsplit

from PIL import Image

from coordexp.errors import PictureError
from coordexp.infra.files import write_bytes
from coordexp.records.images import read_rgb

MAX_BYTES = 2**28
SILENT_SECONDS, ALL_SECONDS = 30.0, 300.0
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


def is_address(image: object) -> TypeGuard[str]:
    """Whether an image is given as a URL."""
    return isinstance(image, str) and bool(_ADDRESS.match(image))


def fetched_files(addresses: Iterable[str], folder: Path) -> list[Path]:
    """Download images to a folder, under the ends of their names; raises PictureError with the URL that failed."""
    paths = []
    for address in addresses:
        name = re.sub(r"[^\w.-]", "_", unquote(PurePosixPath(urlsplit(address).path).name))[-80:] or "picture"
        path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{name}"
        write_bytes(path, _content(address))
        paths.append(path)
    return paths


def fetched_rgb(address: str) -> Image.Image:
    """The image at a URL, read as `read_rgb` reads a file; raises PictureError with the URL."""
    with TemporaryDirectory(prefix="coordexp-") as folder:
        (path,) = fetched_files([address], Path(folder))
        try:
            return read_rgb(path)
        except PictureError as error:
            raise PictureError(str(error).replace(os.fspath(path), address)) from error


def _content(address: str) -> bytes:
    import httpx2

    found, ends = bytearray(), time.monotonic() + ALL_SECONDS
    try:
        with httpx2.stream("GET", address, follow_redirects=True, timeout=SILENT_SECONDS) as answer:
            answer.raise_for_status()
            for part in answer.iter_bytes():
                found += part
                if len(found) > MAX_BYTES or time.monotonic() > ends:
                    limits = f"{MAX_BYTES >> 20} MiB in {ALL_SECONDS:.0f} s"
                    raise PictureError(f"{address}: exceeds the limit of {limits}; download the file yourself.")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise PictureError(f"{address}: cannot be downloaded: {str(error).strip() or type(error).__name__}.") from error
    return bytes(found)
