"""How the image arguments of a command are expanded."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from coordexp.errors import DataError
from coordexp.records.image_files import IMAGE_FORMATS, IMAGE_SUFFIXES, expand_images
from coordexp.records.images import read_rgb


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_suffix_is_written_and_read(tmp_path: Path, suffix: str) -> None:
    """A drawing may be saved with each of these suffixes."""
    Image.new("RGB", (6, 4)).save(tmp_path / f"a{suffix}")
    assert read_rgb(tmp_path / f"a{suffix}").size == (6, 4)


def test_every_format_has_a_reader() -> None:
    Image.init()
    assert IMAGE_FORMATS.keys() <= Image.OPEN.keys()


def test_a_folder_expands_to_its_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.jfif", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "deeper.png").mkdir()
    (tmp_path / "deeper.png" / "c.png").touch()
    assert [path.name for path in expand_images([str(tmp_path)])] == ["a.jfif", "b.JPG"]
    assert [path.name for path in expand_images([str(tmp_path / "*"), str(tmp_path / "b.JPG")])] == [
        *("a.jfif", "b.JPG", "notes.txt"),
    ]


def test_a_folder_without_images_is_an_error_with_the_expected_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"none of its 1 files ends in \.apng, \.bmp, .*Subfolders are not searched"):
        expand_images([str(tmp_path)])
    with pytest.raises(DataError, match="nowhere: no image there"):
        expand_images([str(tmp_path / "nowhere")])
