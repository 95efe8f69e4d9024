"""Find image files from command-line arguments, and make distinct names for their outputs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path

from coordexp.errors import DataError

# Supported formats, by Pillow's names, with their file suffixes. Many phones and cameras write MPO: a JPEG followed by
# more images, of which the first is read; Pillow's JPEG reader supports it.
IMAGE_FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
}
IMAGE_SUFFIXES = frozenset(chain.from_iterable(IMAGE_FORMATS.values()))


def expand_images(arguments: Iterable[str]) -> list[Path]:
    """Expand arguments to image files, each once: files, folders, and glob patterns.

    An explicitly named file is accepted with any suffix; in a folder, only files with a suffix in `IMAGE_SUFFIXES` are.

    Raises:
        DataError: an argument matches no file, or a folder has no file with such a suffix.
    """
    paths: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            matches = _images_of_folder(path)
        elif path.exists():  # also a pipe or a device: reading it raises a precise error
            matches = [path]
        else:
            matches = sorted(p for p in map(Path, glob.glob(argument, recursive=True)) if not p.is_dir())
        if not matches:
            raise DataError(
                f"{argument}: no image there; expected an image file, a folder of images, or a glob pattern."
            )
        paths |= dict.fromkeys(matches)
    return list(paths)


def _images_of_folder(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if not path.is_dir()]
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError(
            f"{folder}: no image there: none of its {len(files)} files ends in {', '.join(sorted(IMAGE_SUFFIXES))}. "
            "Subfolders are not searched; name them, or use a glob pattern."
        )
    return images


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, including linked folders, except links to a parent folder."""
    for place, folders, names in os.walk(folder, followlinks=True):
        if Path(place).resolve() in {parent.resolve() for parent in Path(place).parents}:
            folders.clear()
        else:
            yield from (Path(place) / name for name in names)


def distinct_stems(paths: Sequence[Path]) -> Iterator[str]:
    """A distinct name for each file; repeated names get a number."""
    taken: set[str] = set()
    for path in paths:
        candidates = (f"{path.stem}-{number}" for number in count(2))
        name = next(n for n in chain([path.stem], candidates) if n not in taken)
        taken.add(name)
        yield name


def picture_targets(paths: Sequence[Path], save: Path) -> dict[Path, Path]:
    """The output path of each drawn image; in a folder, repeated names get a number.

    Raises:
        DataError: one output file for several images, or a drawing would replace an input image.
    """
    if save.suffix.lower() in IMAGE_SUFFIXES and not save.is_dir():
        if len(paths) > 1:
            raise DataError(f"--save {save}: one file for {len(paths)} images; give a folder.")
        save.parent.mkdir(parents=True, exist_ok=True)
        targets = {paths[0]: save}
    else:
        save.mkdir(parents=True, exist_ok=True)
        targets = {path: save / f"{name}.png" for path, name in zip(paths, distinct_stems(paths), strict=True)}
    if lost := {path.resolve() for path in paths} & {target.resolve() for target in targets.values()}:
        raise DataError(f"--save {save}: the drawing would replace the image {min(lost)}; choose another place.")
    return targets
