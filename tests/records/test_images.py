"""Image files from cameras, scanners and broken downloads: read in the same way everywhere, or refused by name."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from coordexp.errors import DataError
from coordexp.records.images import (
    EXIF_ORIENTATION,
    UNREADABLE,
    ImageFacts,
    image_sha256,
    inspect_image,
    read_rgb,
    to_rgb,
    unsafe_name,
)
from coordexp.records.shards import MAX_FILE_BYTES


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(folder: Path, name: str, image: Image.Image, **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def gradient_16_bit() -> np.ndarray:
    return np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.jpg", Image.new("L", (40, 30), 128)),
        ("cmyk.jpg", Image.new("CMYK", (40, 30), (127, 127, 127, 0))),
        ("palette.gif", Image.new("RGB", (40, 30), (128, 128, 128)).quantize(4)),
        ("bits.png", Image.new("1", (40, 30), 1)),
    ],
)
def test_modes_become_rgb(tmp_path, name, image):
    path = save(tmp_path, name, image)
    facts = inspect_image(tmp_path, name)
    assert (facts.problem, facts.width, facts.height) == ("", 40, 30)
    rgb = np.asarray(read_rgb(path))
    assert rgb.shape == (30, 40, 3)
    assert np.ptp(rgb.astype(int), axis=-1).max() <= 1  # grey stays grey
    assert abs(int(rgb.mean()) - (255 if name == "bits.png" else 128)) <= 2


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    path = save(tmp_path, "deep.png", Image.fromarray(gradient_16_bit()))
    with Image.open(path) as image:
        assert image.mode.startswith("I;16")
    rgb = np.asarray(read_rgb(path)).astype(int)
    np.testing.assert_allclose(rgb[..., 0], gradient_16_bit() / 257, atol=0.51)
    assert inspect_image(tmp_path, "deep.png").mode.startswith("I")


def test_transparency_is_put_on_white(tmp_path):
    hidden = np.zeros((30, 40, 4), np.uint8)
    hidden[:, 20:] = (255, 0, 0, 255)
    rgb = np.asarray(read_rgb(save(tmp_path, "alpha.png", Image.fromarray(hidden, "RGBA"))))
    assert rgb[:, :20].min() == 255
    assert (rgb[:, 20:] == (255, 0, 0)).all()


def test_16_bit_gray_keeps_its_transparent_value(tmp_path):
    grey = np.full((4, 6), 1000, np.uint16)
    grey[:, 3:] = 30_000
    rgb = np.asarray(read_rgb(save(tmp_path, "clear.png", Image.fromarray(grey), transparency=1000)))
    assert (rgb[:, :3] == 255).all()
    assert (rgb[:, 3:] == 117).all()


STORED = [
    *((mode, "png") for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16")),
    *((mode, "tiff") for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "I", "I;16B")),
    *((mode, "webp") for mode in ("RGB", "RGBA")),
    *((mode, "jpeg") for mode in ("L", "RGB", "CMYK")),
    *((mode, "mpo") for mode in ("L", "RGB")),
    *((mode, "gif") for mode in ("L", "RGB", "RGBA")),
    *((mode, "bmp") for mode in ("1", "L", "RGB")),
]


def picture_of(mode: str) -> Image.Image:
    """Noise in any of Pillow's modes, half of it transparent if the mode supports that."""
    alpha = np.where(np.arange(24) < 12, 60, 255).astype(np.uint8)[None].repeat(18, 0)
    rgba = Image.fromarray(np.dstack([noise(24, 18), alpha]))
    if mode.startswith("I"):
        grey = noise(24, 18)[..., 0].astype(np.int32) * 257
        return Image.fromarray(grey if mode == "I" else grey.astype(">u2" if mode.endswith("B") else "<u2"))
    if mode == "P":
        return rgba.quantize(16)  # a palette with alpha
    if mode == "PA":
        return rgba.convert("RGB").quantize(16).convert("PA")
    return rgba.convert("RGB" if mode in ("CMYK", "YCbCr", "LAB") else "RGBA").convert(mode)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("mode", "suffix"), STORED)
def test_a_file_and_the_image_opened_from_it_give_the_same_pixels(tmp_path, mode, suffix, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"exif": exif} if suffix not in ("gif", "bmp") else {}
    path = save(tmp_path, f"a.{suffix}", picture_of(mode), **options)
    of_file = np.asarray(read_rgb(path))
    with path.open("rb") as handle, Image.open(handle) as image:
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), of_file)
    facts = inspect_image(tmp_path, path.name)
    assert (facts.problem, (facts.height, facts.width, 3)) == ("", of_file.shape)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_tiff_is_read_as_the_rotated_png(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    shown = []
    for name in ("a.png", "a.tif"):
        shown.append(np.asarray(read_rgb(save(tmp_path, name, picture_of(mode), exif=exif))))
        for decode in (False, True):
            facts = inspect_image(tmp_path, name, decode)
            assert (facts.height, facts.width) == shown[0].shape[:2]
            assert facts.orientation == orientation
    np.testing.assert_array_equal(*shown)


@pytest.mark.parametrize("mode", ["La", "RGBa", "RGBX", "HSV", "I;16", "I;16L", "I;16B", "I", "PA", "P"])
def test_images_in_memory_with_modes_that_files_lack_are_converted(mode):
    rgb = np.asarray(to_rgb(Image.new("LA", (4, 3)).convert("La") if mode == "La" else Image.new(mode, (4, 3))))
    assert rgb.shape == (3, 4, 3)
    assert set(np.unique(rgb)) == ({255} if mode in ("La", "RGBa", "PA") else {0})


def test_unusable_images_in_memory_are_refused_with_a_description():
    with pytest.raises(DataError, match=r"PIL image of mode F: .*no known range"):
        to_rgb(Image.new("F", (4, 3)))
    with pytest.raises(DataError, match="expected 16 bits"):
        to_rgb(Image.new("I", (4, 3), 70_000))


def test_an_invalid_orientation_is_ignored(tmp_path):
    for value in (0, 9, 255):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = value
        path = save(tmp_path, "odd.jpg", Image.new("RGB", (40, 30)), exif=exif)
        assert read_rgb(path).size == (40, 30)
        assert inspect_image(tmp_path, "odd.jpg").orientation == 1


def test_floating_point_pixels_are_refused(tmp_path):
    save(tmp_path, "f.tiff", Image.fromarray(np.zeros((4, 4), np.float32)))
    assert inspect_image(tmp_path, "f.tiff").problem == "image_unreadable"
    with pytest.raises(DataError, match="floating-point pixels"):
        read_rgb(tmp_path / "f.tiff")


def test_orientation_6_is_a_quarter_turn_clockwise(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    save(tmp_path, "phone.png", Image.fromarray(noise(40, 30)), exif=exif)
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "phone.png")), np.rot90(noise(40, 30), -1))


def png_header(width: int, height: int) -> bytes:
    """A PNG with this size in its header and almost no content."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [14_000, 60_000])
def test_decompression_bombs_are_not_decoded(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    facts = inspect_image(tmp_path, "bomb.png")
    assert facts.problem == "image_too_large"
    with pytest.raises(DataError, match=r"bomb\.png: .*split or shrink it"):
        read_rgb(tmp_path / "bomb.png")


def test_a_panorama_is_read_unless_its_aspect_ratio_is_too_large(tmp_path):
    save(tmp_path, "wide.png", Image.new("1", (20_000, 100)))
    assert inspect_image(tmp_path, "wide.png") == ImageFacts(
        "wide.png", *_content(tmp_path / "wide.png"), 20_000, 100, "1"
    )
    save(tmp_path, "ribbon.png", Image.new("1", (20_001, 100)))
    assert inspect_image(tmp_path, "ribbon.png").problem == "image_too_long"


def _content(path: Path) -> tuple[int, str]:
    return path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()


def test_decoding_finds_truncated_files(tmp_path):
    out = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(out, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(out.getvalue()[:-400])
    assert inspect_image(tmp_path, "cut.jpg", decode=False).problem == ""
    assert inspect_image(tmp_path, "cut.jpg").problem == "image_unreadable"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.jpg", "image_missing"),
        ("folder", "image_unreadable"),
        ("text.jpg", "image_unreadable"),
        ("empty.jpg", "image_unreadable"),
    ],
)
def test_files_that_are_not_images_are_reported_by_name(tmp_path, name, problem):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    facts = inspect_image(tmp_path, name)
    assert facts.problem == problem
    assert facts.detail


def test_only_the_supported_formats_are_opened(tmp_path, monkeypatch):
    """An EPS file with the suffix of an image would start Ghostscript."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "EPS")
    contents = {"eps.jpg": out.getvalue()}
    for kind in ("PPM", "ICO", "TGA", "PCX", "DDS", "ICNS"):
        out = io.BytesIO()
        Image.new("RGB", (32, 32)).save(out, kind)
        contents[f"{kind}.png"] = out.getvalue()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        facts = inspect_image(tmp_path, name)
        assert (facts.problem, facts.n_bytes) == ("image_unreadable", len(content))
        with pytest.raises(DataError, match=f"{name}: cannot be read as an image .its content is none of JPEG"):
            read_rgb(tmp_path / name)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "socket.jpg"))  # such a name may have 107 bytes
    with server:
        kinds = {"pipe": "named pipe", "endless": "device", "loop": "symbolic", "folder": "folder", "socket": "socket"}
        for name, kind in kinds.items():
            facts = inspect_image(tmp_path, f"{name}.jpg")
            assert (facts.problem, kind in facts.detail) == ("image_unreadable", True), facts
            for read in (read_rgb, image_sha256):
                with pytest.raises(DataError, match=rf"{name}\.jpg: .*{kind}"):
                    read(tmp_path / f"{name}.jpg")


def test_a_pipe_that_replaces_a_file_does_not_block(tmp_path, monkeypatch):
    path = save(tmp_path, "a.png", Image.new("RGB", (4, 4)))
    regular = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda *_, **__: regular)
    with pytest.raises(DataError, match="named pipe"):
        read_rgb(path)


def test_files_of_gigabytes_are_not_read(tmp_path):
    with (tmp_path / "vast.png").open("wb") as out:
        out.truncate(MAX_FILE_BYTES + 1)
    assert inspect_image(tmp_path, "vast.png").problem == "image_too_large"
    with pytest.raises(DataError, match=r"vast\.png: 2147483649 bytes are more"):
        read_rgb(tmp_path / "vast.png")


@pytest.mark.parametrize("error", [*UNREADABLE, Image.DecompressionBombError])
def test_no_decoder_error_ends_the_inspection(tmp_path, monkeypatch, error):
    save(tmp_path, "a.png", Image.new("RGB", (4, 4)))

    def broken(*_, **__):
        raise error("broken")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    assert inspect_image(tmp_path, "a.png").problem in ("image_unreadable", "image_too_large", "image_missing")
    with pytest.raises(DataError, match=r"a\.png"):
        read_rgb(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files_raise_only_picture_errors(tmp_path, suffix):
    out = io.BytesIO()
    Image.fromarray(noise(24, 24)).save(out, suffix)
    rng = np.random.default_rng(0)
    for trial in range(150):
        data = bytearray(out.getvalue())
        for position in rng.integers(0, len(data), rng.integers(1, 12)):
            data[position] = rng.integers(0, 256)
        if trial % 3 == 0:
            data = data[: rng.integers(0, len(data))]
        (tmp_path / "damaged").write_bytes(bytes(data))
        facts = inspect_image(tmp_path, "damaged")
        try:
            read_rgb(tmp_path / "damaged")
        except DataError:
            assert facts.problem
        else:
            assert facts.problem in ("", "image_too_long")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../a.jpg",
        "a/../../b.jpg",
        "..\\a.jpg",
        "C:\\a.jpg",
        "a\0.jpg",
        "a\n.jpg",
        "",
        "  ",
        None,
        3,
        "a\ud800.jpg",
        "a.jpg#flip",
        "a.jpg#crop=1,2,3,4&flip",
    ],
)
def test_paths_that_leave_the_root_or_name_a_view_are_never_opened(tmp_path, name):
    assert unsafe_name(name)
    assert inspect_image(tmp_path, name).problem == "image_path_unsafe"


@pytest.mark.parametrize("name", ["a.jpg", "a/b c/d..e.png", "日本/猫.jpg", "...jpg", "photo #flip.jpg", "a.jpg#"])
def test_ordinary_paths_are_accepted(name):
    assert unsafe_name(name) == ""
