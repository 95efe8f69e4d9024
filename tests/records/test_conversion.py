"""Every format gives the same records for the same images, in the graph and on the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.config.profile import DatasetConfig, RecordsConfig
from coordexp.errors import DataError
from coordexp.infra import workers
from coordexp.records.convert import convert_datasets, convert_file, write_split
from coordexp.records.images import EXIF_ORIENTATION, MANIFEST
from coordexp.records.manifest import IMAGES, READERS, open_split, write_manifest
from coordexp.records.schema import Record
from records_folders import (
    HOLDS_CROWDS,
    LAYOUTS,
    LEAVES_OUT_EMPTY,
    NAMES,
    QUESTIONS,
    Annotated,
    dataset,
    kept,
    picture,
    records_config,
)
from records_folders import write_annotations as write
from records_folders import write_photos as write_some

SIZE = (64, 48)


def boxes(width: int, height: int) -> st.SearchStrategy[tuple[int, int, int, int]]:
    x, y = st.integers(0, width - 2), st.integers(0, height - 2)
    w, h = st.integers(2, width), st.integers(2, height)
    return st.builds(lambda x, y, w, h: (x, y, min(width, x + w), min(height, y + h)), x, y, w, h)


names = st.sampled_from(NAMES)
objects = st.lists(st.tuples(names, boxes(*SIZE), st.booleans()), max_size=4, unique_by=lambda o: o[:2])


@pytest.mark.parametrize("fmt", LAYOUTS)
@given(world=st.lists(objects, min_size=1, max_size=3))
@settings(max_examples=15)
def test_every_format_is_read_back_as_annotated(fmt, world, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    pictures = [Annotated(f"{i}.jpg", SIZE, tuple(objects)) for i, objects in enumerate(world)]
    write(fmt, root, "train", pictures)
    if fmt == "yolo":  # finds its images by listing folders
        (root / "images" / "train").mkdir(parents=True)
        for p in pictures:
            (root / "images" / "train" / p.name).touch()
    reading = open_split(dataset(fmt, root), "train")
    result = kept(reading, size=SIZE)
    assert result.problems == []
    if fmt in LEAVES_OUT_EMPTY:
        pictures = [p for p in pictures if p.objects]
    assert len(result.records) == len(pictures)
    if fmt != "hub":  # names rows
        assert [Path(r.image).name for r in result.records] == [p.name for p in pictures]
    for record, p in zip(result.records, pictures, strict=True):
        found = [(o.desc, tuple(round(v, 9) for v in o.bbox_xyxy_px), bool(o.metadata.get("iscrowd")))
                 for o in record.objects]  # fmt: skip
        wanted = [(desc, box, crowd and fmt in HOLDS_CROWDS) for desc, box, crowd in p.objects]
        assert sorted(found) == sorted(wanted)
        corners = [o.bbox_xyxy_px[:2] for o in record.objects]
        assert corners == sorted(
            corners, key=lambda xy: xy[::-1]
        )  # in reading order, after rounding by YOLO's fractions
        assert (record.width, record.height) == SIZE


def test_every_format_has_a_writer_in_these_tests() -> None:
    assert LAYOUTS.keys() | QUESTIONS.keys() == READERS.keys()


# The graph and the command line ---------------------------------------------------------------------------------------


def write_photos(fmt: str, root: Path) -> dict[str, list[Annotated]]:
    """A folder as phones and downloads leave it: one image is rotated, one is truncated, one has a crowd region."""
    cat, big, crowd = (
        ("cat", (4, 5, 30, 40), False),
        ("red mug", (0, 0, 60, 44), False),
        ("person", (0, 0, 60, 40), True),
    )
    splits = {
        "train": [Annotated(f"{name}.jpg", SIZE, (cat,)) for name in ("plain", "rotated", "cut", "a", "b", "c")],
        "val": [Annotated("val.jpg", SIZE, (big,))],
    }
    splits["train"].append(Annotated("crowd.jpg", SIZE, (cat, big, crowd)))
    for split, pictures in splits.items():
        write(fmt, root, split, pictures)
        folder = root / LAYOUTS[fmt][0].format(split=split)
        folder.mkdir(parents=True, exist_ok=True)
        for i, p in enumerate(pictures):
            image, exif = picture(100 * len(split) + i, *SIZE), Image.Exif()
            if p.name == "rotated.jpg":
                exif[EXIF_ORIENTATION] = 6
                image = image.transpose(Image.Transpose.ROTATE_90)
            image.save(folder / p.name, exif=exif)
            if p.name == "cut.jpg":
                (folder / p.name).write_bytes((folder / p.name).read_bytes()[:300])
    return splits


def both_ways(fmt: str, root: Path, config: RecordsConfig) -> list[Any]:
    """(records, problems) of the train split by the stages and by the command, or their error messages."""
    images, annotations = (part.format(split="train") for part in LAYOUTS[fmt])

    def by_stages() -> tuple[list[Record], list[str]]:
        write_manifest(root / "raw", {"mine": dataset(fmt, root)}, decode=True, workers=2)
        result = convert_datasets(root / "raw", config, seed=0)
        records = sorted([*result.splits["train"], *result.splits["dev"]], key=lambda r: r.image)
        return [_plain(r, f"mine/{images}/") for r in records], list(map(str, result.problems["train"]))

    def by_command() -> tuple[list[Record], list[str]]:
        result = convert_file(dataset(fmt, root).format, root / annotations, root / images, "train", config)
        records = sorted(result.splits["train"], key=lambda r: r.image)
        return [_plain(r, "") for r in records], list(map(str, result.problems["train"]))

    found: list[Any] = []
    for way in (by_stages, by_command):
        try:
            found.append(way())
        except DataError as error:
            found.append(re.sub(r"^\S+/train: ", "", str(error)))
    return found


def _plain(record: Record, prefix: str) -> Record:
    """Without the name of the set, and without the ids that a profile generates if the source has none."""
    metadata = {key: value for key, value in record.metadata.items() if key != "image_id"}
    return replace(record, image=record.image.removeprefix(prefix), metadata=metadata)


@pytest.mark.parametrize("fmt", ["coco", "yolo", "voc", "jsonl"])
def test_stages_and_command_convert_alike(fmt, tmp_path):
    splits = write_photos(fmt, tmp_path)
    dropping = {"wordings": 1, "bad_images": "drop", "max_lost": 0.5}
    by_stages, by_command = both_ways(fmt, tmp_path, records_config(**dropping))
    assert by_stages == by_command
    records, problems = by_stages
    assert {r.image for r in records} == {p.name for p in splits["train"]} - {"cut.jpg"}
    assert all((r.width, r.height) == SIZE for r in records)
    crowds = [o.desc for r in records for o in r.objects if o.metadata.get("iscrowd")]
    assert crowds == (["person"] if fmt in HOLDS_CROWDS else [])
    assert [p for p in problems if "image_unreadable" in p and "cut.jpg" in p] == problems
    for policies, words in (
        ({"bad_images": "error"}, "1 images cannot be used (image_unreadable 1)"),
        ({"min_side_px": 38.0}, "6 of "),
    ):
        by_stages, by_command = both_ways(fmt, tmp_path, records_config(**(dropping | policies)))
        assert by_stages == by_command
        assert words in by_stages


def test_an_image_annotated_without_its_exif_orientation_is_refused_both_ways(tmp_path):
    splits = write_photos("coco", tmp_path)
    turned = [replace(p, size=SIZE[::-1]) if p.name == "rotated.jpg" else p for p in splits["train"]]
    write("coco", tmp_path, "train", turned)
    by_stages, by_command = both_ways("coco", tmp_path, records_config(wordings=1))
    assert by_stages == by_command
    assert "image_exif_rotated (train2017/rotated.jpg is 64 x 48 px, annotated 48 x 64)" in by_stages


# In several processes -------------------------------------------------------------------------------------------------


def outcome(folder: Path, sets: dict[str, DatasetConfig], n_workers: int, **config: Any) -> dict[str, Any] | str:
    """All files that the stages raw and convert write, or their error."""
    try:
        write_manifest(folder / "raw", sets, decode=True, workers=n_workers)
        result = convert_datasets(folder / "raw", records_config(**config), 17, n_workers)
    except DataError as error:
        return str(error)
    for split, records in result.splits.items():
        write_split(folder / f"{split}.jsonl", records, n_workers)
    found: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}
    found |= {name: (folder / "raw" / name).read_bytes() for name in (MANIFEST, IMAGES)}
    return found | {"problems": result.problems, "categories": result.categories(), "sets": result.sets()}


@pytest.fixture
def two_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BATCH", 2)


@pytest.mark.usefixtures("two_a_batch")
@pytest.mark.parametrize("fmt", LAYOUTS)
def test_three_processes_write_the_same_bytes_as_one(fmt: str, tmp_path: Path) -> None:
    write_some(fmt, tmp_path / "set", {"train": 9})
    sets = {"a": dataset(fmt, tmp_path / "set", prompt="listed", val="auto")}
    alone = outcome(tmp_path, sets, 1)
    assert isinstance(alone, dict)
    assert outcome(tmp_path, sets, 3) == alone


@pytest.mark.usefixtures("two_a_batch")
@pytest.mark.parametrize(
    ("stops", "config"),
    [
        (False, {"bad_images": "drop", "flip": 0.5, "crop": 0.5, "max_objects": 1}),
        (True, {"bad_images": "error"}),
        (True, {"bad_images": "drop", "min_side_px": 38.0, "max_lost": 0.1}),
    ],
)
def test_three_processes_write_the_same_bytes_with_several_sets_losses_and_views(
    stops: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    write_some("yolo", tmp_path / "a", {"train": 9, "val": 3})
    write_photos("coco", tmp_path / "b")
    sets = {"b": dataset("coco", tmp_path / "b", prompt="closed"), "a": dataset("yolo", tmp_path / "a", weight=2.5)}
    alone = outcome(tmp_path, sets, 1, **config)
    assert isinstance(alone, str) == stops
    assert outcome(tmp_path, sets, 3, **config) == alone


def test_an_error_in_a_worker_equals_that_of_a_single_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that was added after the raw stage, late in the file."""
    write_some("yolo", tmp_path / "set", {"train": 12, "val": 3})
    write_manifest(tmp_path / "raw", {"a": dataset("yolo", tmp_path / "set")}, decode=False, workers=3)
    picture(50).save(tmp_path / "set/images/train/train009b.jpg")
    messages = set()
    for n_workers in (1, 3):
        with pytest.raises(
            DataError, match=r"train009b\.jpg was missing, or not annotated, when the raw stage"
        ) as raised:
            convert_datasets(tmp_path / "raw", records_config(), 17, n_workers)
        messages.add(str(raised.value))
    assert len(messages) == 1
