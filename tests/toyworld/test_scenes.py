"""Composed scenes: exact boxes, the overlap and visibility rules, reproducibility, and what is held out."""

from __future__ import annotations

import filecmp
import json
import shutil
from itertools import combinations

import numpy as np
import pytest

from coordexp.errors import DataError
from coordexp.geometry.boxes import as_boxes, pairwise_iou, reading_order
from coordexp.records.convert import convert_datasets, convert_file
from coordexp.records.images import MANIFEST, read_record_rgb
from coordexp.records.manifest import IMAGES, write_manifest
from coordexp.records.shards import INDEX
from helpers import SCENES, SPRITES, catalog
from records_folders import records_config
from toyworld import coco_folder, composer
from toyworld.backgrounds import photos
from toyworld.coco_folder import as_datasets, write_coco_folder
from toyworld.composer import MAX_IOU, MIN_VISIBLE, compose_scene
from toyworld.sprites import load_catalog

PLACES = [(split, index) for split in ("train", "val") for index in range(20)]


@pytest.fixture(scope="module")
def scenes():
    return {key: compose_scene(SCENES, catalog(), 3, *key) for key in PLACES}


def test_boxes_lie_inside_and_are_in_reading_order(scenes):
    for scene in scenes.values():
        height, width = scene.pixels.shape[:2]
        boxes = as_boxes([o.bbox_xyxy_px for o in scene.objects])
        assert 1 <= len(boxes) <= SCENES.max_objects
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= [width, height]).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 2).all()
        assert reading_order(boxes).tolist() == list(range(len(boxes)))


def test_sides_are_multiples_of_32_in_range(scenes):
    sides = {side for scene in scenes.values() for side in scene.pixels.shape[:2]}
    assert sides == {64, 96, 128}


def test_no_two_boxes_overlap_above_the_limit(scenes):
    for scene in scenes.values():
        for a, b in combinations([o.bbox_xyxy_px for o in scene.objects], 2):
            assert pairwise_iou(as_boxes([a]), as_boxes([b])).item() <= MAX_IOU


def test_every_object_shows_most_of_its_pixels(monkeypatch):
    """Paint the accepted placements again, one over the other, and count what is left of each."""
    placed: list[tuple[np.ndarray, int, int]] = []
    original = composer._Canvas.try_place

    def recording(canvas, sprite, left, top, desc):
        accepted = original(canvas, sprite, left, top, desc)
        if accepted:
            placed.append((sprite[..., 3] > 0.5, left, top))
        return accepted

    monkeypatch.setattr(composer._Canvas, "try_place", recording)
    least = 1.0
    for index in range(20):
        placed.clear()
        scene = compose_scene(SCENES, catalog(), 3, "train", index)
        owner = np.full(scene.pixels.shape[:2], -1)
        for i, (mask, left, top) in enumerate(placed):
            owner[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = i
        shares = [(owner == i).sum() / mask.sum() for i, (mask, _, _) in enumerate(placed)]
        assert min(shares) >= MIN_VISIBLE
        least = min(least, *shares)
    assert least < 1  # some scenes do overlap


@pytest.mark.parametrize("side_px", [10, 24, 61])
def test_the_frame_of_a_sprite_is_tight_to_one_pixel(side_px):
    for group in catalog().sprites.values():
        for sprite in group:
            for flip in (False, True):
                alpha = sprite.render(side_px, flip)[..., 3]
                rows, columns = (np.flatnonzero((alpha > 0.1).any(axis=axis)) for axis in (1, 0))
                assert max(alpha.shape) == side_px
                assert rows[0] <= 1
                assert rows[-1] >= alpha.shape[0] - 2
                assert columns[0] <= 1
                assert columns[-1] >= alpha.shape[1] - 2


def test_a_flipped_sprite_is_mirrored():
    sprite = catalog().sprites["cat"][0]
    np.testing.assert_array_equal(sprite.render(30, True), sprite.render(30, False)[:, ::-1])


def test_the_same_arguments_give_the_same_bytes(scenes):
    for key in PLACES[::5]:
        again = compose_scene(SCENES, catalog(), 3, *key)
        assert again.pixels.tobytes() == scenes[key].pixels.tobytes()
        assert again.objects == scenes[key].objects


def test_seed_split_and_index_all_count(scenes):
    others = [(4, "train", 0), (3, "val", 0), (3, "train", 1)]
    first = scenes["train", 0].pixels.tobytes()
    assert all(compose_scene(SCENES, catalog(), *other).pixels.tobytes() != first for other in others)


def test_held_out_names_are_in_val_only(scenes):
    held_out = set(catalog().held_out)
    seen = {
        split: {o.desc for key, s in scenes.items() if key[0] == split for o in s.objects} for split in ("train", "val")
    }
    assert held_out
    assert not seen["train"] & held_out
    assert seen["val"] & held_out
    assert seen["val"] - held_out


def test_train_and_val_share_no_background_pixels():
    for train, val in zip(photos(False), photos(True), strict=True):
        assert train.height == val.height
        assert train.width > val.width > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("coco")
    write_coco_folder(out, SCENES, 3, workers=1)
    return out


def test_the_number_of_workers_changes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(coco_folder, "CHUNK_SCENES", 3)
    write_coco_folder(tmp_path, SCENES, 3, workers=2)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == sorted(
        [*(f"annotations/instances_{split}.json" for split in ("train", "val")), INDEX, "train-000.zip", "val-000.zip"]
    )
    assert filecmp.cmpfiles(tmp_path, folder, files, shallow=False) == (files, [], [])


def test_the_folder_reads_back_as_the_scenes(folder, scenes):
    for split, count in (("train", SCENES.train_images), ("val", SCENES.val_images)):
        annotations = folder / coco_folder.ANNOTATIONS.format(split=split)
        result = convert_file("coco", annotations, folder / split, split)
        assert result.drops()[split] == {}
        (declared,) = result.declared.values()
        assert {c.name for c in declared if c.split == "held_out"} == set(catalog().held_out)
        assert len(result.splits[split]) == count
        for index, record in enumerate(result.splits[split]):
            scene = scenes[split, index]
            assert (record.height, record.width) == scene.pixels.shape[:2]
            assert [(o.desc, o.bbox_xyxy_px) for o in record.objects] == [
                (o.desc, o.bbox_xyxy_px) for o in scene.objects
            ]


def test_a_composed_folder_goes_the_way_of_a_users(folder, tmp_path):
    """Its manifest holds nothing of where it was made, so the same scenes give the same bytes everywhere."""
    results = []
    for place in ("here", "there"):
        raw = tmp_path / place
        shutil.copytree(folder, raw / "images")
        write_manifest(raw, as_datasets(raw / "images").sets, decode=True, workers=2)
        splits = convert_datasets(raw, records_config(wordings=1), seed=17).splits
        assert all(read_record_rgb(raw, r.image).size == (r.width, r.height) for rs in splits.values() for r in rs)
        results.append((splits, (raw / MANIFEST).read_bytes(), (raw / IMAGES).read_bytes()))
    assert results[0] == results[1]
    assert [r.image for r in results[0][0]["val"]] == [f"images/val/{i:06d}.jpg" for i in range(SCENES.val_images)]


def test_areas_are_those_of_the_boxes(folder):
    rows = json.loads((folder / "annotations" / "instances_train.json").read_text())["annotations"]
    assert all(row["area"] == row["bbox"][2] * row["bbox"][3] > 0 for row in rows)


def test_a_folder_without_manifest_is_named(tmp_path):
    with pytest.raises(DataError, match=r"catalog\.json: not found"):
        load_catalog(tmp_path)


def test_a_changed_sprite_is_named(tmp_path):
    first = json.loads((SPRITES / "catalog.json").read_text())[0]
    (tmp_path / "catalog.json").write_text(json.dumps([first]))
    with pytest.raises(DataError, match="missing, or its sha256"):
        load_catalog(tmp_path)
    shutil.copy(SPRITES / first["file"], tmp_path)
    assert load_catalog(tmp_path).descs == (first["desc"],)
    with (tmp_path / first["file"]).open("ab") as sprite:
        sprite.write(b"x")
    with pytest.raises(DataError, match="sha256 differs"):
        load_catalog(tmp_path)
