"""Images: the only module that opens them, converts them to RGB, and finds the faults of a file.

Frame: pixels as a viewer shows them. The EXIF orientation is applied on reading, so width, height and boxes are those
of the image that a person annotated. 16-bit gray is scaled to 8 bits, transparency is put on white, CMYK and palettes
become RGB. Training, prediction, drawing and checks all use this module, so they see the same pixels.

Files are foreign input: only regular files are opened (`records/shards.py`, which also reads images in shards), and
only with the decoders of `IMAGE_FORMATS`. Pillow by default tries all its decoders, and its EPS decoder starts
Ghostscript.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from coordexp.errors import DataError, PictureError
from coordexp.infra.foreign import FileTooLargeError, Gate
from coordexp.records.image_files import IMAGE_FORMATS
from coordexp.records.shards import (
    INDEX,
    RESTORE,
    ImageSource,
    ImageStream,
    find_source,
    open_source,
    shards_hash,
)

# Pillow's own limit: beyond it, a small file could decompress to gigabytes ("decompression bomb").
MAX_IMAGE_PIXELS = 178_956_970
# Pillow warns above half of that size, which is an ordinary panorama. (Process-wide, because per-call filters are not
# thread-safe.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MAX_ASPECT_RATIO = 200  # the limit of Qwen3-VL's processor
EXIF_ORIENTATION = 0x0112
# Exceptions of Pillow's decoders on broken files: besides its own, anything that a corrupted number can cause.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, RuntimeError, MemoryError, struct.error, zlib.error),
)
TOO_LARGE = (FileTooLargeError, Image.DecompressionBombError)
_FORMATS = ", ".join(IMAGE_FORMATS)
# EXIF orientation -> operation that turns the stored image upright; the last four swap width and height.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MANIFEST = "manifest.json"  # in a folder of data sets (records/manifest.py)
MANIFESTS = Gate("the manifest of the raw stage", DataError, "Run it again: dvc repro --force --single-item raw.")
_VIEW = re.compile(r"#(?:crop=(\d+),(\d+),(\d+),(\d+))?(&?flip)?$")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Facts of one image file: content hash, upright size, and the reason if it cannot be used."""

    name: str
    n_bytes: int = 0
    sha256: str = ""  # of the file's bytes, 64 hex digits
    width: int = 0
    height: int = 0
    mode: str = ""  # Pillow's mode: L, RGB, CMYK, I;16, ...
    orientation: int = 1  # EXIF: 1 is upright, 5 to 8 swap width and height
    problem: str = ""  # empty, or one of the reasons in docs/data.md
    detail: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """A crop of an image in integer pixels (None: the whole image), then possibly mirrored."""

    crop: tuple[int, int, int, int] | None = None
    flip: bool = False

    def suffix(self) -> str:
        """The suffix of the image's name; empty for the whole image."""
        parts = [f"crop={','.join(map(str, self.crop))}"] if self.crop else []
        parts += ["flip"] if self.flip else []
        return f"#{'&'.join(parts)}" if parts else ""

    def of(self, image: Image.Image) -> Image.Image:
        """The pixels of the view."""
        if self.crop:
            image = image.crop(self.crop)
        return ImageOps.mirror(image) if self.flip else image


WHOLE_PICTURE = View()


def split_view(name: str) -> tuple[str, View]:
    """Split an image name into file name and view; without a suffix, the view is the whole image."""
    found = _VIEW.search(name)
    if not found or found.end() - found.start() == 1:
        return name, WHOLE_PICTURE
    x1, y1, x2, y2, flip = found.groups()
    crop = None if x1 is None else (int(x1), int(y1), int(x2), int(y2))
    return name[: found.start()], View(crop, flip is not None)


def read_record_rgb(image_root: Path, name: str) -> Image.Image:
    """The image of a record as upright RGB; its name is relative to the root of its set and may contain a view."""
    file_name, view = split_view(name)
    rgb = read_rgb(record_source(image_root, file_name))
    return rgb if view is WHOLE_PICTURE else view.of(rgb)


def record_sha256(image_root: Path, name: str) -> str:
    """Hex digest of the file bytes of a record's image, regardless of the view; raises as `read_rgb`."""
    return image_sha256(record_source(image_root, split_view(name)[0]))


def read_rgb(source: ImageSource) -> Image.Image:
    """Read an image file, or an image in a shard, as upright 8-bit RGB.

    Raises:
        PictureError: the file is missing, not regular, too large, damaged, or has an unsupported format.
    """
    with open_image(source) as image:
        return _upright_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image in memory in the same way as `read_rgb` converts a file.

    Raises:
        PictureError: its pixels cannot be decoded, or their range is unknown.
    """
    with _named_errors(f"PIL image of mode {image.mode}"):
        _refuse_bombs(image)
        return _upright_rgb(image)


@contextmanager
def open_image(source: ImageSource) -> Iterator[Image.Image]:
    """Open an image as it is stored; pixels are decoded on use.

    Raises:
        PictureError: as `read_rgb`, also for decoding errors within the block.
    """
    with _named_errors(str(source)), open_source(source) as handle, _decoder(handle) as image:
        yield image


def image_sha256(source: ImageSource) -> str:
    """Hex digest of an image's bytes; raises PictureError if the file is missing or not regular."""
    with _named_errors(str(source)), open_source(source) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise PictureError(
            f"{what}: no such file; expected an image. If a record refers to it, run the raw stage."
        ) from error
    except TOO_LARGE as error:
        raise PictureError(f"{what}: {error}; split or shrink it.") from error
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise PictureError(
            f"{what}: cannot be read as an image ({reason}). Expected an intact {_FORMATS} file: restore or convert it."
        ) from error


def _decoder(handle: ImageStream) -> Image.Image:
    try:
        image = Image.open(handle, formats=tuple(IMAGE_FORMATS))
    except Image.UnidentifiedImageError as error:
        raise OSError(f"its content is none of {_FORMATS}") from error
    _refuse_bombs(image)
    return image


def _refuse_bombs(image: Image.Image) -> None:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} px are more than the {MAX_IMAGE_PIXELS} that are read"
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 if it is missing or invalid."""
    value = image.getexif().get(EXIF_ORIENTATION, 1)
    return value if isinstance(value, int) and value in _TURNS else 1


def _shown_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Upright width and height of an image that is not decoded yet; for a TIFF, Pillow reports them itself."""
    return image.size[::-1] if orientation >= 5 and image.format != "TIFF" else image.size


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    orientation = _orientation(image)  # after loading: Pillow turns a TIFF upright when it loads it
    rgb = _as_rgb(image)
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's convert would clip everything above 255 to white
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        # Pillow converts premultiplied gray only to LA.
        shown = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        paper = Image.new("RGB", shown.size, "white")
        paper.paste(shown, mask=shown.getchannel("A"))
        return paper
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"mode {image.mode} with values {grey.min()}..{grey.max()}, expected 16 bits")
    scaled = np.rint(grey / 257.0).astype(np.uint8)
    clear = image.info.get("transparency")  # the single transparent value of a PNG
    if isinstance(clear, int):
        scaled[grey == clear] = 255
    return Image.fromarray(scaled).convert("RGB")


def inspect_image(root: Path, name: str, decode: bool = True) -> ImageFacts:
    """Inspect one image; faults are reported in `problem`.

    Args:
        root: folder that names are relative to.
        name: relative path with forward slashes.
        decode: also decode the pixels, which finds truncated files.

    Raises:
        DataError: the root has shards, and one of them is missing or damaged, so that its images cannot be inspected.
    """
    if reason := unsafe_name(name):
        return ImageFacts(str(name), problem="image_path_unsafe", detail=reason)
    source = find_source(root, name)
    known: dict[str, Any] = {"name": name}
    try:
        with open_source(source) as handle:
            known["sha256"] = hashlib.file_digest(handle, "sha256").hexdigest()
            known["n_bytes"] = handle.seek(0, io.SEEK_END)
            handle.seek(0)
            return _inspect_content(handle, known, decode)
    except FileNotFoundError:
        return ImageFacts(name, problem="image_missing", detail=f"no file {source}")
    except TOO_LARGE as error:
        return ImageFacts(**known, problem="image_too_large", detail=str(error))
    except UNREADABLE as error:
        return ImageFacts(**known, problem="image_unreadable", detail=f"{type(error).__name__}: {error}")


def _inspect_content(handle: ImageStream, known: dict[str, Any], decode: bool) -> ImageFacts:
    with _decoder(handle) as image:
        orientation = _orientation(image)
        width, height = _shown_size(image, orientation)
        known = known | {"width": width, "height": height, "mode": image.mode, "orientation": orientation}
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            detail = f"{width} x {height} px, the longer side is more than {MAX_ASPECT_RATIO} times the shorter"
            return ImageFacts(**known, problem="image_too_long", detail=detail)
        if decode:
            known["width"], known["height"] = _upright_rgb(image).size
    return ImageFacts(**known)


def unsafe_name(name: object) -> str:
    """The reason why a path must not be used below an image root, or the empty string."""
    if not isinstance(name, str) or not name.strip():
        return f"found {name!r}, expected a relative path"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or ".." in name.split("\\") or name[1:3] == ":\\":
        return "leaves the image root"
    if any(ord(char) < 32 or "\ud800" <= char <= "\udfff" for char in name):
        return "holds control characters"
    if split_view(name)[1] is not WHOLE_PICTURE:
        return "ends as records name a part of an image (#flip, #crop=...); rename the file"
    return ""


def manifest_of(folder: Path) -> dict[str, Any]:
    """manifest.json of a folder of data sets; empty for a plain folder of images."""
    path = folder / MANIFEST
    return MANIFESTS.read_object(path) if path.is_file() else {}


@lru_cache(maxsize=64)
def image_roots(folder: Path) -> dict[str, Path]:
    """Set -> root of its images; empty for a plain folder of images.

    Raises:
        DataError: the shards of a set differ from the manifest.
    """
    roots = {}
    for name, described in manifest_of(folder).get("sets", {}).items():
        roots[name] = folder / described["root"]
        if described.get("shards_hash", "") != shards_hash(roots[name]):
            raise DataError(
                f"{roots[name] / INDEX}: changed or deleted since the raw stage inspected set {name!r}. {RESTORE}"
            )
    return roots


def record_source(folder: Path, name: str) -> ImageSource:
    """The source of a record's image: below `folder`, or below the root of the set that the name starts with.

    Names come from records, which `parse_record` checks, or from the user.

    Raises:
        DataError: the name does not start with a set of the manifest, or a shard is missing or damaged.
    """
    if not (roots := image_roots(folder)):
        return find_source(folder, name)
    set_name, _, rest = name.partition("/")
    if set_name not in roots:
        known = ", ".join(sorted(roots))
        raise DataError(f"image {name!r} does not start with a set of {folder / MANIFEST}; its sets: {known}.")
    return find_source(roots[set_name], rest)
