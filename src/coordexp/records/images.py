"""Image files: one way to read them as RGB, and one look at a file that says all that is wrong with it.

Frame: pixels as a viewer shows them. An EXIF orientation is applied on reading, so width, height and boxes are those of
the picture a person annotated; 16-bit grey is scaled to 8 bit, transparency is put on white, CMYK and palettes become
RGB.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from coordexp.errors import DataError

# Pillow's own limit: above it a small file may unpack to gigabytes.
MAX_IMAGE_PIXELS = 178_956_970
# Pillow warns from half of that on, which is an ordinary panorama. (Process-wide: filters set per call are not
# safe in threads.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MAX_ASPECT_RATIO = 200  # as Qwen3-VL's processor
EXIF_ORIENTATION = 0x0112
# What Pillow's decoders raise on broken files.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """One image file: its content, its size as shown, and a named problem if it cannot be used."""

    name: str
    n_bytes: int = 0
    sha256: str = ""  # hex, whole; of the file's bytes
    width: int = 0
    height: int = 0
    mode: str = ""  # Pillow's: L, RGB, CMYK, I;16 ...
    orientation: int = 1  # EXIF: 1 is upright, 5 to 8 swap width and height
    problem: str = ""  # empty, or one of the reasons in docs/data.md
    detail: str = ""


def read_rgb(path: Path) -> Image.Image:
    """Read an image file as upright 8-bit RGB; raises DataError naming the file if that is not possible."""
    try:
        with Image.open(path) as image:
            _refuse_bombs(image)
            return _as_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}; split or shrink it.") from error
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read as an image ({error}). Expected a JPEG or PNG; run the raw stage."
        ) from error


def _refuse_bombs(image: Image.Image) -> None:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} px are more than the {MAX_IMAGE_PIXELS} that are read"
        )


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow alone would clip everything above 255 to white
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"mode {image.mode} with values {grey.min()}..{grey.max()}, expected 16 bits")
        return Image.fromarray(np.rint(grey / 257.0).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        shown = image.convert("RGBA")
        paper = Image.new("RGB", shown.size, "white")
        paper.paste(shown, mask=shown.getchannel("A"))
        return paper
    return image.convert("RGB")


def inspect_image(root: Path, name: str, decode: bool = True) -> ImageFacts:
    """Look at one file once; never raises, what is wrong is in `problem`.

    Args:
        root: folder that names start from.
        name: relative path with forward slashes.
        decode: also unpack the pixels, which is what finds files that were cut off.
    """
    if reason := unsafe_name(name):
        return ImageFacts(str(name), problem="image_path_unsafe", detail=reason)
    path = root / name
    try:
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
            n_bytes = handle.tell()
    except FileNotFoundError:
        return ImageFacts(name, problem="image_missing", detail=f"no file {path}")
    except OSError as error:
        return ImageFacts(name, problem="image_unreadable", detail=str(error))
    known: dict[str, Any] = {"name": name, "n_bytes": n_bytes, "sha256": digest.hexdigest()}
    try:
        return _inspect_content(path, known, decode)
    except Image.DecompressionBombError as error:
        return ImageFacts(**known, problem="image_too_large", detail=str(error))
    except UNREADABLE as error:
        return ImageFacts(**known, problem="image_unreadable", detail=f"{type(error).__name__}: {error}")


def _inspect_content(path: Path, known: dict[str, Any], decode: bool) -> ImageFacts:
    with Image.open(path) as image:
        orientation = int(image.getexif().get(EXIF_ORIENTATION, 1))
        width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        known = known | {"width": width, "height": height, "mode": image.mode, "orientation": orientation}
        _refuse_bombs(image)
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            detail = f"{width} x {height} px, the longer side is more than {MAX_ASPECT_RATIO} times the shorter"
            return ImageFacts(**known, problem="image_too_long", detail=detail)
        if decode:
            _as_rgb(image)
    return ImageFacts(**known)


def unsafe_name(name: object) -> str:
    """Why a path may not be used below an image root, or the empty string."""
    if not isinstance(name, str) or not name.strip():
        return f"found {name!r}, expected a relative path"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or ".." in name.split("\\") or name[1:3] == ":\\":
        return "leaves the image root"
    if any(ord(char) < 32 or "\ud800" <= char <= "\udfff" for char in name):
        return "holds control characters"
    return ""
