"""The public data sets, built from small stand-ins: a wheel with photos, and COCO's archives on a local server."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pipelines import fetch

from coordexp.config.loading import load_profile
from coordexp.errors import EXIT_DONE, EXIT_USAGE
from coordexp.infra.download import PIP, RemoteFile
from coordexp.records.convert import convert_datasets
from coordexp.records.manifest import write_manifest
from coordexp.records.public_sets import DOWNLOADS, PUBLIC_SETS, TREE_PHOTOS, Part, PublicSet, unpack
from coordexp.records.tiles import grid

SIZES_WH = [(450, 300), (200, 200), (385, 193), (192, 100)]
LABELS = ("Tree", "Dead", "Alive")


def remote(path: Path, source: str) -> RemoteFile:
    return RemoteFile(path.name, source, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def random_boxes(rng: np.random.Generator, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Different boxes as Pascal VOC counts them, from 1, some of them at the borders."""
    boxes = [(1, 1, 20, 30), (width - 40, height - 25, width, height)]
    for _ in range(40):
        x, y, w, h = (int(rng.integers(1, limit)) for limit in (width - 60, height - 60, 60, 60))
        boxes.append((x, y, x + w, y + h))
    return sorted(set(boxes))


def write_wheel(path: Path) -> dict[str, tuple[Image.Image, list[tuple[int, int, int, int]]]]:
    """A wheel with the layout of the real one; returns photos and boxes by name."""
    rng, photos = np.random.default_rng(3), {}
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("deepforest/data/SOAP_031.png", b"not annotated, not read")
        wheel.writestr("deepforest-2.1.0.dist-info/licenses/LICENSE", "MIT License\n")
        for name, (width, height) in zip(TREE_PHOTOS, SIZES_WH, strict=True):
            photo = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            boxes, png = random_boxes(rng, width, height), io.BytesIO()
            photo.save(png, format="PNG")
            tags = ("xmin", "ymin", "xmax", "ymax")
            objects = "".join(
                f"<object><name>{LABELS[i % 3]}</name><bndbox>"
                + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, box, strict=True))
                + "</bndbox></object>"
                for i, box in enumerate(boxes)
            )
            size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            xml = f"<annotation><filename>{name}.tif</filename>{size}{objects}</annotation>"
            wheel.writestr(f"deepforest/data/{name}.png", png.getvalue())
            wheel.writestr(f"deepforest/data/{name}.xml", xml)
            photos[name] = photo, boxes
    return photos


@pytest.fixture
def trees(tmp_path: Path) -> tuple[dict[str, PublicSet], Path, dict]:
    """The registry with a stand-in for the wheel, which is where pip would put it."""
    datasets = tmp_path / "datasets"
    (datasets / DOWNLOADS).mkdir(parents=True)
    wheel = datasets / DOWNLOADS / "deepforest-2.1.0-py3-none-any.whl"
    photos = write_wheel(wheel)
    known = PUBLIC_SETS["trees"]
    return {"trees": replace(known, files=(remote(wheel, known.files[0].source),))}, datasets, photos


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def profile_records(name: str, repository: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """The output of `raw` and `convert` for a set with the committed profile, with one dev image."""
    monkeypatch.setenv("DVC_ROOT", str(root))
    profile = load_profile(repository / "configs" / f"{name}.yaml")
    write_manifest(root / "raw", profile.source.sets, True, 1)
    converted = convert_datasets(root / "raw", profile.records.model_copy(update={"dev_images": 1}), 17)
    lost = {reason for reasons in converted.drops().values() for reason in reasons}
    assert lost <= {"duplicate_object"}  # two random boxes may coincide after clipping
    return {split: list(records) for split, records in converted.splits.items()}


def test_trees_consist_of_photo_tiles_with_clipped_boxes(trees, repository, monkeypatch, capsys) -> None:
    sets, datasets, photos = trees
    assert fetch.main(["trees", "--datasets", str(datasets)], sets) == EXIT_DONE
    assert "next:" in capsys.readouterr().out
    folder = datasets / "trees"
    assert (folder / "LICENSE").read_text() == "MIT License\n"
    homes: Counter[tuple[str, tuple[int, int, int, int]]] = Counter()
    for split in ("train", "val"):
        instances = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        assert [c["name"] for c in instances["categories"]] == ["tree"]
        shown = {image["file_name"]: image for image in instances["images"]}
        assert sorted(shown) == sorted(path.name for path in (folder / split).iterdir())
        expected = 0
        for name in (name for name, its in TREE_PHOTOS.items() if its == split):
            photo, boxes = photos[name]
            for row, tiles in enumerate(grid(*photo.size, 192)):
                for column, (left, top, right, bottom) in enumerate(tiles):
                    image = shown[f"{name}-{row:02d}-{column:02d}.png"]
                    pixels = Image.open(folder / split / image["file_name"])
                    assert pixels.tobytes() == photo.crop((left, top, right, bottom)).tobytes()
                    assert (image["width"], image["height"]) == pixels.size
                    found = {
                        (tuple(a["bbox"]), a["iscrowd"])
                        for a in instances["annotations"]
                        if a["image_id"] == image["id"]
                    }
                    wanted = set()
                    for x1, y1, x2, y2 in boxes:
                        part = (max(x1 - 1, left), max(y1 - 1, top), min(x2, right), min(y2, bottom))
                        width, height = part[2] - part[0], part[3] - part[1]
                        if width < 1 or height < 1:
                            continue
                        is_object = 2 * width * height >= (x2 - x1 + 1) * (y2 - y1 + 1)
                        wanted.add(((part[0] - left, part[1] - top, width, height), int(not is_object)))
                        homes[name, (x1, y1, x2, y2)] += is_object
                    assert found == wanted
                    expected += 1
        assert len(shown) == expected
    assert set(homes.values()) <= {0, 1, 2}  # a quarter in each of four tiles; half in each of two
    assert sum(homes.values()) > 0.9 * len(homes)
    records = profile_records("trees", repository, datasets.parent, monkeypatch)
    of_photo = {split: {Path(r.image.split("#")[0]).stem[:-6] for r in records[split]} for split in records}
    assert of_photo["val"] == {name for name, split in TREE_PHOTOS.items() if split == "val"}
    assert not of_photo["val"] & (of_photo["train"] | of_photo["dev"])
    assert {o.desc for split in records.values() for r in split for o in r.objects} == {"tree"}


def test_trees_are_rebuilt_to_the_same_bytes_and_never_replace_a_foreign_folder(trees, capsys) -> None:
    sets, datasets, _ = trees
    arguments = ["trees", "--datasets", str(datasets)]
    assert fetch.main(arguments, sets) == EXIT_DONE
    first = content(datasets / "trees")
    (datasets / "trees" / "train").rename(datasets / "trees" / "lost")
    assert fetch.main(arguments, sets) == EXIT_DONE
    assert content(datasets / "trees") == first
    assert sorted(path.name for path in datasets.iterdir()) == [DOWNLOADS, "trees"]
    (datasets / "trees" / "LICENSE").unlink()
    assert fetch.main(arguments, sets) == EXIT_USAGE
    assert "Move it away" in capsys.readouterr().err


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(60, 400))
def test_a_grid_covers_the_image_exactly_once(width: int, height: int, longest: int) -> None:
    rows = grid(width, height, longest)
    sides = {(x2 - x1, y2 - y1) for row in rows for x1, y1, x2, y2 in row}
    assert max(max(side) for side in sides) <= longest
    assert max(w for w, _ in sides) - min(w for w, _ in sides) <= 1
    assert max(h for _, h in sides) - min(h for _, h in sides) <= 1
    assert sum((x2 - x1) * (y2 - y1) for row in rows for x1, y1, x2, y2 in row) == width * height
    assert (rows[0][0][:2], rows[-1][-1][2:]) == ((0, 0), (width, height))


PICTURES = 30


def write_archives(folder: Path) -> list[Path]:
    """The two archives of COCO 2017 in small: with separate entries for folders, and files that are not needed."""
    images, annotations = [], []
    with zipfile.ZipFile(folder / "val2017.zip", "w") as archive:
        archive.writestr("val2017/", "")
        for i in range(1, PICTURES + 1):
            jpeg = io.BytesIO()
            Image.new("RGB", (64, 48), (8 * i, 90, 255 - 8 * i)).save(jpeg, format="JPEG")
            archive.writestr(f"val2017/{i:012d}.jpg", jpeg.getvalue())
            images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": 64, "height": 48})
            annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 20, 10], "iscrowd": 0})
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as archive:
        for name in ("instances_val2017", "instances_train2017", "captions_val2017"):
            archive.writestr(f"annotations/{name}.json", json.dumps(instances))
    return [folder / "val2017.zip", folder / "annotations_trainval2017.zip"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def coco(tmp_path: Path) -> Iterator[tuple[dict[str, PublicSet], Path]]:
    """The registry with stand-ins on a local server."""
    served = tmp_path / "served"
    served.mkdir()
    paths = write_archives(served)
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    files = tuple(remote(path, f"http://127.0.0.1:{http.server_port}/{path.name}") for path in paths)
    parts = [
        Part("val2017.zip", "val2017", PICTURES),
        *(Part("annotations_trainval2017.zip", f"annotations/instances_{s}2017.json") for s in ("val", "train")),
    ]
    known = PUBLIC_SETS["coco-val2017"]
    yield {"coco-val2017": replace(known, files=files, build=unpack(parts))}, tmp_path / "datasets"
    http.shutdown()
    http.server_close()


def test_coco_is_downloaded_into_the_layout_of_its_profile(coco, repository, monkeypatch, capsys) -> None:
    sets, datasets = coco
    assert fetch.main(["coco-val2017", "--datasets", str(datasets)], sets) == EXIT_DONE
    told = capsys.readouterr().out
    assert "0.0 MB" in told
    assert "coordexp doctor --pin --profile coco-val2017" in told
    files = [f"val2017/{i:012d}.jpg" for i in range(1, PICTURES + 1)]
    files += [f"annotations/instances_{split}2017.json" for split in ("train", "val")]
    assert sorted(content(datasets / "coco")) == sorted(files)
    records = profile_records("coco-val2017", repository, datasets.parent, monkeypatch)
    assert sum(map(len, records.values())) == PICTURES
    assert all(records.values())


def test_existing_parts_are_kept_and_an_incomplete_folder_is_an_error(coco, capsys) -> None:
    sets, datasets = coco
    arguments = ["coco-val2017", "--datasets", str(datasets)]
    own = datasets / "coco" / "annotations" / "instances_train2017.json"
    own.parent.mkdir(parents=True)
    own.write_text("of the user")
    assert fetch.main(arguments, sets) == EXIT_DONE
    assert own.read_text() == "of the user"
    before = content(datasets / "coco")
    for archive in (datasets / DOWNLOADS).glob("*.zip"):
        archive.unlink()  # existing files are not downloaded again
    assert fetch.main(arguments, sets) == EXIT_DONE
    assert list((datasets / DOWNLOADS).glob("*.zip")) == []
    assert content(datasets / "coco") == before
    (datasets / "coco" / "val2017" / f"{PICTURES:012d}.jpg").unlink()
    assert fetch.main(arguments, sets) == EXIT_USAGE
    assert f"has {PICTURES - 1} files, expected {PICTURES}" in capsys.readouterr().err


def test_without_network_the_error_states_what_to_do(coco, capsys) -> None:
    sets, datasets = coco
    known = sets["coco-val2017"]
    files = tuple(replace(file, source=f"http://pictures.invalid/{file.name}") for file in known.files)
    assert fetch.main(["coco-val2017", "--datasets", str(datasets)], {"coco-val2017": replace(known, files=files)}) == 2
    captured = capsys.readouterr()
    assert "cannot be downloaded" in captured.err
    assert f"into {datasets / DOWNLOADS} as val2017.zip" in captured.err
    assert not (datasets / "coco").exists()


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path, capsys) -> None:
    archive = tmp_path / DOWNLOADS / "evil.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("val2017/../../../escaped.jpg", b"x")
    build = unpack([Part("evil.zip", "val2017", 1)])
    sets = {"evil": PublicSet("evil", "none", (remote(archive, "http://pictures.invalid/evil.zip"),), build, ())}
    assert fetch.main(["evil", "--datasets", str(tmp_path)], sets) == EXIT_USAGE
    assert "leads out of the folder" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("escaped*")] == []


def test_the_registry_has_hashes_and_profiles(repository: Path) -> None:
    for name, known in PUBLIC_SETS.items():
        assert (repository / "configs" / f"{name}.yaml").is_file()  # each has a profile with its name
        for file in known.files:
            assert len(file.sha256) == 64
            assert file.bytes > 0
            assert file.source.startswith((PIP, "http://images.cocodataset.org/"))
