"""Image files as cameras, scanners and broken downloads make them: read alike everywhere, or named."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coordexp.errors import DataError
from coordexp.records.images import EXIF_ORIENTATION, ImageFacts, inspect_image, read_rgb, unsafe_name


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


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
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


def test_floating_point_pixels_are_refused(tmp_path):
    save(tmp_path, "f.tiff", Image.fromarray(np.zeros((4, 4), np.float32)))
    assert inspect_image(tmp_path, "f.tiff").problem == "image_unreadable"
    with pytest.raises(DataError, match="floating-point pixels"):
        read_rgb(tmp_path / "f.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    save(tmp_path, "phone.png", Image.fromarray(noise(40, 30)), exif=exif)
    facts = inspect_image(tmp_path, "phone.png")
    assert facts.orientation == orientation
    assert read_rgb(tmp_path / "phone.png").size == (facts.width, facts.height)
    assert (facts.width, facts.height) == ((30, 40) if orientation >= 5 else (40, 30))


def test_orientation_6_is_a_quarter_turn_clockwise(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    save(tmp_path, "phone.png", Image.fromarray(noise(40, 30)), exif=exif)
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "phone.png")), np.rot90(noise(40, 30), -1))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [14_000, 60_000])
def test_decompression_bombs_are_not_unpacked(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    facts = inspect_image(tmp_path, "bomb.png")
    assert facts.problem == "image_too_large"
    with pytest.raises(DataError, match=r"bomb\.png: .*split or shrink it"):
        read_rgb(tmp_path / "bomb.png")


def test_a_panorama_is_read_unless_it_is_too_long(tmp_path):
    save(tmp_path, "wide.png", Image.new("1", (20_000, 100)))
    assert inspect_image(tmp_path, "wide.png") == ImageFacts(
        "wide.png", *_content(tmp_path / "wide.png"), 20_000, 100, "1"
    )
    save(tmp_path, "ribbon.png", Image.new("1", (20_001, 100)))
    assert inspect_image(tmp_path, "ribbon.png").problem == "image_too_long"


def _content(path: Path) -> tuple[int, str]:
    return path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_that_are_cut_off_are_found_by_decoding(tmp_path):
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
def test_what_is_no_image_is_named(tmp_path, name, problem):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    facts = inspect_image(tmp_path, name)
    assert facts.problem == problem
    assert facts.detail


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files_never_raise_anything_else(tmp_path, suffix):
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
    ],
)
def test_paths_that_leave_the_root_are_never_opened(tmp_path, name):
    assert unsafe_name(name)
    assert inspect_image(tmp_path, name).problem == "image_path_unsafe"


@pytest.mark.parametrize("name", ["a.jpg", "a/b c/d..e.png", "日本/猫.jpg", "...jpg"])
def test_ordinary_paths_are_fine(name):
    assert unsafe_name(name) == ""
