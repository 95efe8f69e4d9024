"""Small public data sets that one command downloads to `datasets/`, verified by hash, each folder atomically."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from coordexp.errors import DataError
from coordexp.infra.download import RemoteFile, Say, fetch
from coordexp.infra.files import replace_folder, write_bytes, write_text
from coordexp.infra.resume import holding
from coordexp.records.categories import Category
from coordexp.records.convert import convert_file
from coordexp.records.images import unsafe_name
from coordexp.records.schema import Record
from coordexp.records.tiles import write_tiles

DOWNLOADS = "downloads"  # subfolder of datasets/; may be emptied once the sets are complete

Get = Callable[[str], Path]  # downloads a file of the set, by name
Build = Callable[[Get, Path], Iterator[str]]  # (get, folder of the set) -> lines about the results


@dataclass(frozen=True, slots=True)
class PublicSet:
    """A public data set: its folder below `datasets/`, the files to download, and the function that builds it."""

    folder: str
    terms: str  # license terms in words
    files: tuple[RemoteFile, ...]
    build: Build
    then: tuple[str, ...]  # commands to run next, with remarks


def fetch_set(wanted: PublicSet, datasets: Path, say: Say) -> None:
    """Create `datasets/<folder>`; `say` receives progress messages. Existing parts are not changed.

    Raises:
        DataError: a file cannot be downloaded, or a foreign file or folder is in the way.
        BusyError: another process is downloading.
    """
    size, downloads = sum(file.bytes for file in wanted.files) / 1e6, datasets / DOWNLOADS
    say(f"{datasets / wanted.folder}: {size:,.1f} MB to download if missing, {size * 8 / 100:,.0f} s at 100 Mbit/s")
    say(f"terms: {wanted.terms}")
    files = {file.name: file for file in wanted.files}
    with holding(downloads, "downloading data sets", waits=False):
        for line in wanted.build(lambda name: fetch(files[name], downloads, say), datasets / wanted.folder):
            say(line)
    say("next:")
    for line in wanted.then:
        say(f"  {line}")


# Annotated aerial photos in a wheel -> tiles of one label.
TREE_PHOTOS = {  # stem of the photo and of its Pascal VOC file -> split; the splits share no photo
    "2019_YELL_2_528000_4978000_image_crop2": "train",
    "SOAP_061": "train",
    "2019_YELL_2_541000_4977000_image_crop": "val",
    "OSBS_029": "val",
}
TREE = Category(1, "tree")  # the source has the labels Tree, Alive and Dead
TILE_PX = 192  # longest side
WHEEL, PHOTO_FOLDER = "deepforest-2.1.0-py3-none-any.whl", "deepforest/data"
LICENSE = "LICENSE"
ABOUT_TREES = """Trees in aerial photos, cut out of the wheel of deepforest 2.1.0 by `make trees`.

Photos and boxes: Copyright (c) 2019, Ben Weinstein, under the MIT license in LICENSE. Weinstein et al. 2020,
DeepForest: A Python package for RGB deep learning tree crown delineation, doi:10.1111/2041-210X.13472. The airborne
photos are of the National Ecological Observatory Network (NEON).

Each photo is a grid of equal tiles without overlap, named after it: PHOTO-ROW-COLUMN.png. Splits are by photo.
A box that a tile's border cuts is clipped. Where at least half of it is in the tile, it is an object there; else an
ignore region (iscrowd). All boxes are called tree, living and dead ones.
"""


def build_trees(get: Get, folder: Path) -> Iterator[str]:
    """Build a COCO folder of tiles; an existing one is replaced."""
    if folder.exists() and not (folder / LICENSE).is_file():
        raise DataError(
            f"{folder}: exists, but this command did not make it: no {LICENSE} there. Move it away; it is not replaced."
        )
    with TemporaryDirectory(prefix=".trees-", dir=folder.parent) as temporary:
        photos, made = Path(temporary) / "photos", Path(temporary) / "made"
        with _opened(get(WHEEL)) as wheel:
            for name in TREE_PHOTOS:
                for suffix in (".png", ".xml"):
                    write_bytes(photos / f"{name}{suffix}", _member(wheel, f"{PHOTO_FOLDER}/{name}{suffix}"))
            licenses = [n for n in wheel.namelist() if n.endswith(f".dist-info/licenses/{LICENSE}")]
            write_bytes(made / LICENSE, _member(wheel, licenses[0] if licenses else LICENSE))
        write_text(made / "README.md", ABOUT_TREES)
        records = {
            Path(r.image).stem: _one_label(r) for r in convert_file("voc", photos, photos, "train").splits["train"]
        }
        for split in ("train", "val"):
            of_split = [records[name] for name, its in TREE_PHOTOS.items() if its == split]
            tiles = write_tiles(of_split, photos, made, split, TILE_PX, [TREE])
            regions = sum(bool(o.metadata.get("iscrowd")) for r in tiles for o in r.objects)
            objects = sum(len(r.objects) for r in tiles) - regions
            boxes = sum(len(r.objects) for r in of_split)
            yield (
                f"{split}: {len(of_split)} photos with {boxes} boxes: {len(tiles)} tiles with {objects} objects and "
                f"{regions} ignore regions"
            )
        replace_folder(made, folder)


def _one_label(record: Record) -> Record:
    return replace(record, objects=tuple(replace(obj, desc=TREE.name) for obj in record.objects))


# COCO 2017: folders and files in archives -> the layout that the profiles expect.
COCO_VAL_PICTURES = 5000


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an archive: a folder with this number of files, or a single file (0)."""

    archive: str
    path: str
    files: int = 0

    def is_there(self, folder: Path) -> bool:
        """Whether it was extracted before; raises DataError for a folder with another number of files."""
        target = folder / self.path
        if not self.files or not target.exists():
            return target.exists()
        found = sum(1 for _ in target.iterdir())
        if found != self.files:
            raise DataError(f"{target}: has {found} files, expected {self.files}. Move it away; it is not replaced.")
        return True


def unpack(parts: Sequence[Part]) -> Build:
    """Extract parts of archives, each atomically; existing parts are not changed."""

    def build(get: Get, folder: Path) -> Iterator[str]:
        for part in parts:
            if part.is_there(folder):
                yield f"{folder / part.path}: exists already"
                continue
            with _opened(get(part.archive)) as archive:
                _take(archive, part, folder)
            yield f"{folder / part.path}: extracted from {part.archive}"

    return build


def _take(archive: zipfile.ZipFile, part: Part, folder: Path) -> None:
    if not part.files:
        write_bytes(folder / part.path, _member(archive, part.path))
        return
    names = [name for name in archive.namelist() if fnmatchcase(name, f"{part.path}/?*")]
    if unsafe := [name for name in names if unsafe_name(name)]:
        raise DataError(f"{archive.filename}: {unsafe[0]!r} leads out of the folder. Nothing was extracted.")
    if len(names) != part.files:
        raise DataError(f"{archive.filename}: has {len(names)} files in {part.path}, expected {part.files}.")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unpacked-", dir=folder) as temporary:
        for name in names:
            target = Path(temporary) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                out.write(_member(archive, name))
        replace_folder(Path(temporary) / part.path, folder / part.path)


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a ZIP archive ({error}). Remove it and run this again.") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive.filename}: {name} is missing or damaged ({error}).") from error


_COCO = "http://images.cocodataset.org"
# Sizes and hashes are from TensorFlow Datasets; COCO does not publish any.
_VAL = RemoteFile(
    "val2017.zip", f"{_COCO}/zips/val2017.zip", 815_585_330,
    "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
)  # fmt: skip
_ANNOTATIONS = RemoteFile(
    "annotations_trainval2017.zip", f"{_COCO}/annotations/annotations_trainval2017.zip", 252_907_541,
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
)  # fmt: skip
_TREES = RemoteFile(
    WHEEL, "pip:deepforest==2.1.0", 20_639_595,
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
)  # fmt: skip

PUBLIC_SETS = {
    "trees": PublicSet(
        folder="trees",
        terms="MIT, Copyright (c) 2019, Ben Weinstein; the text is next to the images",
        files=(_TREES,),
        build=build_trees,
        then=(
            "coordexp doctor --profile trees --page trees.html   inspect the tiles",
            "dvc exp run --temp -S profile=trees                 the whole graph",
        ),
    ),
    "coco-val2017": PublicSet(
        folder="coco",
        terms="annotations CC BY 4.0, by the COCO Consortium; each image under the terms of its owner on Flickr",
        files=(_VAL, _ANNOTATIONS),
        build=unpack(
            [
                Part("val2017.zip", "val2017", COCO_VAL_PICTURES),
                Part("annotations_trainval2017.zip", "annotations/instances_val2017.json"),
                Part("annotations_trainval2017.zip", "annotations/instances_train2017.json"),
            ]
        ),
        then=(
            "link or download the model to models/Qwen3-VL-2B-Instruct, then:",
            "coordexp doctor --pin --profile coco-val2017        pin the model; estimate memory and hours",
            "make check-profile PROFILE=coco-val2017             run every data stage on 16 images, and one step",
            "dvc exp run --temp -S profile=coco-val2017 -S decode.max_new_tokens=4096",
            "docs/real_data.md describes what was tested, and the requirements",
        ),
    ),
}
