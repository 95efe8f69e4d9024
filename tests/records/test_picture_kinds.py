"""Images of all common kinds: each is read as a viewer shows it, or quickly refused by name.

Checks and readers must agree, and the only exception for any file is PictureError.
"""

from __future__ import annotations

import gzip
import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from coordexp.errors import PictureError
from coordexp.records.images import inspect_image, read_rgb

RGB = Image.fromarray((np.indices((24, 32)).sum(0)[..., None] * np.array([3, 4, 2]) % 256).astype(np.uint8))
RED = Image.new("RGB", (32, 24), (250, 10, 10))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, *more: bytes, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join((chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


def frames(kind: str, **options: Any) -> bytes:
    return saved(RED, kind, save_all=True, append_images=[Image.new("RGB", (32, 24), (0, 0, 255))] * 3, **options)


def palette_with_alpha() -> bytes:
    image = RED.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    return saved(image, "PNG", transparency=bytes([0, 128, 255, 255]))


def with_exif(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(RGB, "JPEG", exif=exif)


def with_text(n_bytes: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * n_bytes, zip=True)
    return saved(RGB, "PNG", pnginfo=info)


def bmp(width: int, height: int) -> bytes:
    whole = bytearray(saved(RGB, "BMP"))
    whole[18:26] = struct.pack("<ii", width, height)
    return bytes(whole)


def tiff_loop() -> bytes:
    """A directory whose next one is itself."""
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<HHHII", 1, 256, 3, 1, 32) + struct.pack("<I", 8)


def sixteen_bit_rgb() -> bytes:
    rows = b"".join(b"\x00" + struct.pack(">96H", *([65535, 0, 32768] * 32)) for _ in range(24))
    return png(32, 24, 16, 2, data=rows)


PNG, JPEG, GIF, WEBP, TIFF, BMP = (saved(RGB, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"))
READ: dict[str, bytes] = {
    "jpeg.jpg": JPEG,
    "progressive.jpg": saved(RGB, "JPEG", progressive=True, quality=95),
    "grey.jpg": saved(RGB.convert("L"), "JPEG"),
    "cmyk.jpg": saved(RGB.convert("CMYK"), "JPEG"),
    "exif orientation 0.jpg": with_exif(0),
    "exif orientation 9.jpg": with_exif(9),
    "broken exif.jpg": saved(RGB, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"),
    "garbage icc.jpg": saved(RGB, "JPEG", icc_profile=b"garbage" * 20),
    "trailing garbage.jpg": JPEG + b"garbage" * 1000,
    "capital.JPG": JPEG,
    "a png called.jpg": PNG,
    "mpo.jpg": frames("MPO"),
    "png.png": PNG,
    "one bit.png": saved(RGB.convert("1"), "PNG"),
    "two bits.png": saved(RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=4), "PNG", bits=2),
    "palette with alpha.png": palette_with_alpha(),
    "grey with alpha.png": saved(RGB.convert("LA"), "PNG"),
    "rgba.png": saved(RGB.convert("RGBA"), "PNG"),
    "16 bit grey.png": saved(Image.fromarray(np.full((24, 32), 8000, np.uint16)), "PNG"),
    "16 bit rgb.png": sixteen_bit_rgb(),
    "long text.png": with_text(100_000),
    "animated.png": frames("PNG"),
    "one pixel.png": saved(Image.new("RGB", (1, 1)), "PNG"),
    "gif.gif": GIF,
    "animated.gif": frames("GIF", duration=10, loop=0),
    "transparent.gif": saved(RGB.convert("P"), "GIF", transparency=0),
    "webp.webp": WEBP,
    "lossless with alpha.webp": saved(RGB.convert("RGBA"), "WEBP", lossless=True),
    "animated.webp": frames("WEBP", duration=10),
    "tiff.tif": TIFF,
    "pages.tif": frames("TIFF"),
    "lzw.tif": saved(RGB, "TIFF", compression="tiff_lzw"),
    "deflate.tif": saved(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "jpeg in.tif": saved(RGB, "TIFF", compression="jpeg"),
    "cmyk.tif": saved(RGB.convert("CMYK"), "TIFF"),
    "lab.tif": saved(Image.new("LAB", (32, 24)), "TIFF"),
    "16 bit.tif": saved(Image.fromarray(np.full((24, 32), 8000, np.uint16)), "TIFF"),
    "bmp.bmp": BMP,
    "palette.bmp": saved(RGB.convert("P"), "BMP"),
    "upside down.bmp": bmp(32, -24),
}
REFUSED: dict[str, bytes] = {
    "empty.jpg": b"",
    "text.jpg": b"no picture\n" * 50,
    "html.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
    "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "pdf.png": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "postscript.jpg": saved(RGB, "EPS"),
    "ppm.png": saved(RGB, "PPM"),
    "icon.png": saved(RGB.resize((32, 32)), "ICO"),
    "jpeg 2000.jpg": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\x00" * 200,
    "heic.jpg": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + b"\x00" * 200,
    "xbm.png": b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = { 0x00 };",
    "gzip.jpg": gzip.compress(JPEG),
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "cut.png": PNG[: len(PNG) // 2],
    "cut.webp": WEBP[: len(WEBP) // 2],
    "cut.tif": TIFF[: len(TIFF) // 2],
    "cut.bmp": BMP[: len(BMP) // 2],
    "first bytes.jpg": JPEG[:20],
    "wrong checksum.png": PNG[:45] + bytes([PNG[45] ^ 255]) + PNG[46:],
    "no data.png": png(32, 24),
    "no size.png": png(0, 0),
    "bomb.png": png(60_000, 60_000),
    "wide.png": png(2**31 - 1, 1),
    "text bomb.png": with_text(70_000_000),
    "float.tif": saved(Image.fromarray(np.full((24, 32), 0.5, np.float32)), "TIFF"),
    "32 bit.tif": saved(Image.fromarray(np.full((24, 32), 10**6, np.int32)), "TIFF"),
    "loop.tif": tiff_loop(),
    "large.bmp": bmp(2**31 - 1, 2**31 - 1),
    "no size.bmp": bmp(0, 0),
    "no size.gif": b"GIF89a\x00\x00\x00\x00\x00\x00\x00;",
    "large.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x08\x01\x00\x00;",
}


def timed(look: Callable[[], Any]) -> Any:
    begin = time.process_time()
    found = look()
    assert time.process_time() - begin < 3
    return found


@pytest.mark.parametrize("name", READ)
def test_images_are_read_as_a_viewer_shows_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(READ[name])
    facts = timed(lambda: inspect_image(tmp_path, name))
    assert facts.problem == "", facts.detail
    rgb = timed(lambda: read_rgb(tmp_path / name))
    assert (rgb.mode, rgb.size) == ("RGB", (facts.width, facts.height))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(REFUSED[name])
    facts = timed(lambda: inspect_image(tmp_path, name))
    assert facts.problem in ("image_unreadable", "image_too_large", "image_too_long")
    assert facts.detail
    with pytest.raises(PictureError, match=name.replace(".", r"\.")):
        timed(lambda: read_rgb(tmp_path / name))


def test_the_first_of_several_images_in_a_file_is_read(tmp_path: Path) -> None:
    for name in ("mpo.jpg", "animated.png", "animated.gif", "animated.webp", "pages.tif"):
        (tmp_path / name).write_bytes(READ[name])
        assert np.abs(np.asarray(read_rgb(tmp_path / name), float) - (250, 10, 10)).max() < 12, name
