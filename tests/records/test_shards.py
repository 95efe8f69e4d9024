"""Images in shards equal images in files, byte for byte, and every reader of an image detects damage."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.errors import DataError
from coordexp.records import shards
from coordexp.records.convert import convert_datasets
from coordexp.records.images import EXIF_ORIENTATION, image_roots, inspect_image, read_record_rgb, record_sha256
from coordexp.records.manifest import IMAGES, write_manifest
from coordexp.records.schema import write_records
from coordexp.records.shards import INDEX, find_source, open_source, write_shards
from helpers import SCENES
from records_folders import picture, records_config
from toyworld.coco_folder import as_datasets, write_coco_folder

CONTENTS = {f"train/{i:02d}.bin": bytes([i]) * (3 * i + 1) for i in range(7)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shards, "SHARD_PICTURES", 3)
    yield
    shards._members.cache_clear()


def read(root: Path, name: str) -> bytes:
    with open_source(find_source(root, name)) as handle:
        return handle.read()


def unpacked(root: Path, out: Path) -> Path:
    """The same folder with its images as files, unpacked by a ZIP tool."""
    shutil.copytree(root, out, ignore=shutil.ignore_patterns("*.zip", INDEX))
    for shard in sorted(root.glob("*.zip")):
        with zipfile.ZipFile(shard) as archive:
            archive.extractall(out)
    return out


def test_images_in_shards_equal_images_in_files(tmp_path: Path) -> None:
    write_coco_folder(tmp_path / "shards" / "images", SCENES, 3, workers=2)
    unpacked(tmp_path / "shards" / "images", tmp_path / "files" / "images")
    assert len(list(tmp_path.glob("files/images/*/*.jpg"))) == SCENES.train_images + SCENES.val_images
    assert not list(tmp_path.glob("shards/images/*/*.jpg"))
    found = []
    for kind in ("files", "shards"):
        raw = tmp_path / kind
        manifest = write_manifest(raw, as_datasets(raw / "images").sets, decode=True, workers=2)
        assert bool(manifest["sets"]["images"].pop("shards_hash")) == (kind == "shards")
        splits = convert_datasets(raw, records_config(wordings=1, flip=0.5), seed=17).splits
        names = [record.image for records in splits.values() for record in records]
        lines = []
        for split, records in splits.items():
            write_records(tmp_path / f"{split}.jsonl", records)
            lines.append((tmp_path / f"{split}.jsonl").read_bytes())
        pixels = [np.asarray(read_record_rgb(raw, name)).tobytes() for name in names]
        hashes = [record_sha256(raw, name) for name in names]
        found.append((manifest, (raw / IMAGES).read_bytes(), lines, pixels, hashes))
    assert found[0] == found[1]


NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20), unique=True)


@settings(max_examples=40)
@given(names=NAMES, data=st.data())
def test_written_images_are_read_back_and_equal_images_give_equal_bytes(
    names: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    contents = {f"a/{name}": data.draw(st.binary(max_size=40)) for name in sorted(names)}
    written = []
    for _ in range(2):
        root = tmp_path_factory.mktemp("shards")
        write_shards(root, {"a": iter(contents.items())})
        written.append({path.name: path.read_bytes() for path in root.iterdir()})
        assert {name: read(root, name) for name in contents} == contents
        zipped = {}
        for shard in root.glob("*.zip"):
            with zipfile.ZipFile(shard) as archive:
                assert archive.testzip() is None
                zipped |= {name: archive.read(name) for name in archive.namelist()}
        assert zipped == contents
    assert written[0] == written[1]


def test_a_name_outside_all_shards_is_a_file_or_missing(tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": CONTENTS.items()})
    (tmp_path / "beside.bin").write_bytes(b"a file")
    assert read(tmp_path, "beside.bin") == b"a file"
    assert inspect_image(tmp_path, "train/99.bin").problem == "image_missing"


def test_a_name_in_a_shard_is_never_a_path(tmp_path: Path) -> None:
    root = tmp_path / "root"
    out = io.BytesIO()
    picture(1).save(out, "JPEG")
    write_shards(root, {"train": [("../out.jpg", out.getvalue())]})
    assert inspect_image(root, "../out.jpg").problem == "image_path_unsafe"
    assert {path.name for path in tmp_path.iterdir()} == {"root"}


def test_threads_and_forked_processes_read_at_once(tmp_path: Path) -> None:
    contents = {f"{i:03d}": bytes([i]) * 5000 for i in range(40)}
    write_shards(tmp_path, {"train": contents.items()})
    names = [*contents] * 20
    wanted = [contents[name] for name in names]
    roots = [tmp_path] * len(names)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, roots, names)) == wanted
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as processes:  # as the workers of a DataLoader
        assert list(processes.map(read, roots, names, chunksize=50)) == wanted


def refused(root: Path) -> list[str]:
    """Read every image again: each equals what was written, or raises a DataError. Returns the errors."""
    shards._members.cache_clear()
    messages = []
    for name, content in CONTENTS.items():
        try:
            assert read(root, name) == content
        except DataError as error:
            messages.append(str(error))
    return messages


@settings(max_examples=150)
@given(data=st.data())
def test_all_damage_is_detected(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("damaged")
    write_shards(root, {"train": CONTENTS.items()})
    assert refused(root) == []
    path = data.draw(st.sampled_from(sorted(root.glob("*.zip"))))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    is_cut = data.draw(st.booleans())
    if is_cut:
        content = content[:at]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    messages = refused(root)  # a changed bit may be irrelevant, such as one of a timestamp
    assert all(message.startswith(f"{path}: ") and "dvc checkout" in message for message in messages)
    assert not is_cut or len(messages) == len(CONTENTS)


def test_flipped_bits_in_directory_or_image_are_detected(tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": CONTENTS.items()})
    shard = tmp_path / "train-001.zip"
    whole = shard.read_bytes()
    directory = json.loads((tmp_path / INDEX).read_text())[shard.name]["directory_offset"]
    for at, count in ((directory + 40, len(CONTENTS)), (len(whole) - 1, len(CONTENTS)), (directory - 1, 1)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        shard.write_bytes(damaged)
        messages = refused(tmp_path)
        assert len(messages) == count
        assert all(message.startswith(f"{shard}: damaged, or changed since it was written") for message in messages)


def test_a_missing_or_irregular_shard_is_an_error_with_its_name(tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": CONTENTS.items()})
    shard = tmp_path / "train-002.zip"
    shard.unlink()
    messages = refused(tmp_path)
    assert len(messages) == len(CONTENTS)
    assert all(f"{shard}: no such shard" in m and "dvc checkout" in m and "dvc repro" in m for m in messages)
    shard.mkdir()
    assert all("it is a folder, expected a regular file" in message for message in refused(tmp_path))
    for text in ("", "[]", "{", '{"train-000.zip": {}}', '{"train-000.zip": 3}'):
        (tmp_path / INDEX).write_text(text)
        messages = refused(tmp_path)
        assert len(messages) == len(CONTENTS)
        assert all(INDEX in m and "xpected the list of shards" in m and "dvc checkout" in m for m in messages)


def test_shards_that_differ_from_the_manifest_are_refused(tmp_path: Path) -> None:
    """The shards are intact, but do not belong to the records: a stage that reads an image detects that."""
    raw = tmp_path / "raw"
    write_coco_folder(raw / "images", SCENES, 3, workers=2)
    sets = as_datasets(raw / "images").sets
    write_manifest(raw, sets, decode=False, workers=1)
    name = "images/val/000000.jpg"
    assert read_record_rgb(raw, name).size
    old = (raw / "images" / "val-000.zip").read_bytes()
    write_coco_folder(raw / "images", SCENES, 4, workers=2)
    for kept in (True, False):
        if not kept:
            (raw / "images" / INDEX).unlink()
        with pytest.raises(DataError, match=r"-shards\.json: changed or deleted since the raw stage .*dvc checkout"):
            fresh(read_record_rgb, raw, name)
        with pytest.raises(DataError, match=r"coordexp-shards\.json: changed or deleted since the raw stage"):
            fresh(convert_datasets, raw, records_config(), 17)
    write_coco_folder(raw / "images", SCENES, 4, workers=2)
    write_manifest(raw, sets, decode=False, workers=1)
    (raw / "images" / "val-000.zip").write_bytes(old)
    with pytest.raises(DataError, match=r"val-000\.zip: damaged, or changed"):
        fresh(read_record_rgb, raw, name)


def fresh(call, *arguments):
    """As in a new process, which has read nothing yet."""
    image_roots.cache_clear()
    shards._members.cache_clear()
    return call(*arguments)


def test_images_in_shards_are_validated_like_files(tmp_path: Path) -> None:
    """Formats, decompression bombs, truncated files, orientations: the rules are the same as for files."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    contents = {"text.jpg": b"no image", "empty.jpg": b""}
    for name, kind, options in (
        ("plain.jpg", "JPEG", {}), ("turned.jpg", "JPEG", {"exif": exif}), ("turned.tif", "TIFF", {"exif": exif}),
        ("eps.jpg", "EPS", {}), ("tga.png", "TGA", {}), ("plain.png", "PNG", {}),
    ):  # fmt: skip
        out = io.BytesIO()
        picture(5).save(out, kind, **options)
        contents[name] = out.getvalue()
    contents["cut.jpg"] = contents["plain.jpg"][:-300]
    out = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(out, "PNG")
    contents["bomb.png"] = out.getvalue()
    files, root = tmp_path / "files", tmp_path / "shards"
    files.mkdir()
    for name, content in contents.items():
        (files / name).write_bytes(content)
    write_shards(root, {"all": sorted(contents.items())})
    problems = set()
    for name in contents:
        of_file, of_shard = inspect_image(files, name), inspect_image(root, name)
        assert of_file == of_shard
        problems.add(of_file.problem)
        seen = []
        for folder in (files, root):
            try:
                seen.append(np.asarray(read_record_rgb(folder, name)).tobytes())
            except DataError as error:
                seen.append(str(error).partition(f"{name}: ")[2])
        assert seen[0] == seen[1] != ""
    assert problems == {"", "image_unreadable", "image_too_large"}
