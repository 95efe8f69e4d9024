"""Composed scenes: exact boxes, the overlap and visibility rules, reproducibility, and what is held out."""

from __future__ import annotations

import colorsys
import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from coordexp.errors import DataError
from coordexp.geometry.boxes import as_boxes, pairwise_iou, reading_order
from coordexp.records.categories import Split
from coordexp.records.convert import convert_datasets, convert_file
from coordexp.records.images import MANIFEST, read_record_rgb
from coordexp.records.manifest import IMAGES, write_manifest
from coordexp.records.shards import INDEX
from helpers import SCENES, SPRITES, catalog
from records_folders import records_config
from toyworld import coco_folder, composer
from toyworld.backgrounds import photos
from toyworld.coco_folder import as_datasets, write_coco_folder
from toyworld.composer import MIN_VISIBLE, compose_scene
from toyworld.sprites import DARKEST, LIGHTEST, LUMA, load_catalog

PLACES = [(split, index) for split in ("train", "val") for index in range(20)]


@pytest.fixture(scope="module")
def scenes():
    return {key: compose_scene(SCENES, catalog(), 3, *key) for key in PLACES}


COMPOSE = """
import hashlib, sys
from pathlib import Path
import numpy as np
from coordexp.config.profile import ScenesConfig
from toyworld.composer import compose_scene
from toyworld.sprites import load_catalog, tinted
source = ScenesConfig.model_validate_json(sys.argv[1])
catalog = load_catalog(Path(source.sprites))
made = [compose_scene(source, catalog, 3, split, index).pixels for split in ("train", "val") for index in range(5)]
made.append(tinted(np.random.default_rng(1).uniform(0, 255, (200, 200, 4)).astype(np.float32), (200, 30, 90)))
print(hashlib.sha256(b"".join(pixels.tobytes() for pixels in made)).hexdigest())
"""


def test_scenes_are_the_same_on_other_processors(repository: Path) -> None:
    """The variables select code for an old processor; the library of matrix products would round otherwise there."""
    absent = " ".join(name for name in __cpu_dispatch__ if __cpu_features__[name])
    processors = [{"OPENBLAS_CORETYPE": "Nehalem"}, {"NPY_DISABLE_CPU_FEATURES": absent}]
    processors += [{"OPENBLAS_CORETYPE": "SkylakeX"}] if __cpu_features__["AVX512_SKX"] else []
    found = {
        subprocess.run(
            [sys.executable, "-c", COMPOSE, SCENES.model_dump_json()],
            env=os.environ | {"PYTHONPATH": str(repository / "src")} | processor,
            capture_output=True, text=True, check=True,
        ).stdout
        for processor in ({}, *processors)
    }  # fmt: skip
    assert len(found) == 1


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
            assert pairwise_iou(as_boxes([a]), as_boxes([b])).item() <= SCENES.max_iou


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


def test_seed_split_and_index_all_change_the_scene(scenes):
    others = [(4, "train", 0), (3, "val", 0), (3, "train", 1)]
    first = scenes["train", 0].pixels.tobytes()
    assert all(compose_scene(SCENES, catalog(), *other).pixels.tobytes() != first for other in others)


def tiers_in(scenes) -> set[str]:
    tier_of = {label.name: label.tier for label in catalog().labels}
    return {tier_of[o.desc] for scene in scenes for o in scene.objects}


def test_labels_that_are_held_out_are_in_val_only(scenes):
    assert tiers_in(scene for key, scene in scenes.items() if key[0] == "train") == {"train"}
    assert tiers_in(scene for key, scene in scenes.items() if key[0] == "val") == set(get_args(Split)) - {"held_out"}


def test_pretraining_renders_only_the_phrase_tier_of_the_held_out_tiers():
    found = [compose_scene(SCENES, catalog(), 3, "train", index, unwritten=0.5) for index in range(40)]
    assert tiers_in(found) == {"train", "phrase"}
    assert tiers_in(compose_scene(SCENES, catalog(), 3, "val", i, unwritten=0.5) for i in range(10)) != {"train"}


def test_no_noun_is_plain_and_tinted_in_one_scene(scenes):
    for scene in scenes.values():
        words = [o.desc.split() for o in scene.objects]
        assert not {w[0] for w in words if len(w) == 1} & {w[1] for w in words if len(w) == 2}


def test_the_held_out_pairs_are_a_latin_square():
    """Each colored noun lacks one color in each tier, and each color is lacked equally often: a quarter in all."""
    pairs = [label for label in catalog().labels if label.color and label.tier in ("train", "strict", "phrase")]
    nouns = {label.noun for label in pairs}
    assert len(pairs) == len(nouns) * len(catalog().colors)
    assert len(nouns) >= 36
    for tier in ("strict", "phrase"):
        of_tier = [label for label in pairs if label.tier == tier]
        assert Counter(label.noun for label in of_tier) == dict.fromkeys(nouns, 1)
        assert set(Counter(label.color for label in of_tier).values()) == {len(nouns) // len(catalog().colors)}
    assert sum(label.tier != "train" for label in pairs) / len(pairs) == 0.25


def test_training_contains_the_words_of_every_tier_except_never():
    words = set(catalog().words)
    known = {tier: [words.issuperset(label.name.split()) for label in of] for tier, of in catalog().tiers.items()}
    assert {tier for tier, hits in known.items() if all(hits)} == {"train", "strict", "phrase", "plain_only"}
    assert not any(known["never"])


def test_a_tint_keeps_the_order_of_luminance_and_gives_one_hue():
    for sprite in (group[0] for group in list(catalog().sprites.values())[::5]):
        plain = sprite.render(40, False)
        for name, color in catalog().colors.items():
            pixels = sprite.render(40, False, color)
            np.testing.assert_array_equal(pixels[..., 3], plain[..., 3])
            light, before = pixels[..., :3] @ LUMA, plain[..., :3] @ LUMA
            np.testing.assert_allclose(light, 255 * DARKEST + (LIGHTEST - DARKEST) * before, atol=0.5)
            hues = {colorsys.rgb_to_hsv(*rgb)[0] for rgb in pixels[..., :3].reshape(-1, 3).tolist()}
            wanted = colorsys.rgb_to_hsv(*color)[0]
            assert max(min(abs(h - wanted), 1 - abs(h - wanted)) for h in hues) < 0.02, name


def test_train_and_val_share_no_background_pixels():
    for train, val in zip(photos(False), photos(True), strict=True):
        assert train.height == val.height
        assert train.width > val.width > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("coco")
    write_coco_folder(out, SCENES, 3, workers=1)
    return out


def test_the_number_of_workers_does_not_change_the_scenes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(coco_folder, "CHUNK_SCENES", 3)
    write_coco_folder(tmp_path, SCENES, 3, workers=2)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == sorted(
        [*(f"annotations/instances_{split}.json" for split in ("train", "val")), INDEX, "train-000.zip", "val-000.zip"]
    )
    assert filecmp.cmpfiles(tmp_path, folder, files, shallow=False) == (files, [], [])


def test_the_folder_converts_back_to_the_scenes(folder, scenes):
    for split, count in (("train", SCENES.train_images), ("val", SCENES.val_images)):
        annotations = folder / coco_folder.ANNOTATIONS.format(split=split)
        result = convert_file("coco", annotations, folder / split, split)
        assert result.drops()[split] == {}
        (declared,) = result.declared.values()
        assert {(c.name, c.split) for c in declared} == {(label.name, label.tier) for label in catalog().labels}
        assert len(result.splits[split]) == count
        for index, record in enumerate(result.splits[split]):
            scene = scenes[split, index]
            assert (record.height, record.width) == scene.pixels.shape[:2]
            assert [(o.desc, o.bbox_xyxy_px) for o in record.objects] == [
                (o.desc, o.bbox_xyxy_px) for o in scene.objects
            ]


def test_a_composed_folder_is_treated_like_a_user_data_set(folder, tmp_path):
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
    own = [r for r in results[0][0]["val"] if "probe" not in r.metadata]
    assert [r.image for r in own] == [f"images/val/{i:06d}.jpg" for i in range(SCENES.val_images)]


def test_areas_are_those_of_the_boxes(folder):
    rows = json.loads((folder / "annotations" / "instances_train.json").read_text())["annotations"]
    assert all(row["area"] == row["bbox"][2] * row["bbox"][3] > 0 for row in rows)


def test_a_folder_without_manifest_is_named(tmp_path):
    with pytest.raises(DataError, match=r"catalog\.json: not found"):
        load_catalog(tmp_path)


def test_a_changed_sprite_is_named(tmp_path):
    first = json.loads((SPRITES / "catalog.json").read_text())[0]
    one = {"colors": {"red": [225, 35, 35]}, "nouns": [{"noun": first["noun"], "use": "plain_only"}]}
    (tmp_path / "labels.json").write_text(json.dumps(one))
    (tmp_path / "catalog.json").write_text(json.dumps([first]))
    with pytest.raises(DataError, match="missing, or its sha256"):
        load_catalog(tmp_path)
    shutil.copy(SPRITES / first["file"], tmp_path)
    labels = load_catalog(tmp_path).labels
    assert [(label.name, label.tier) for label in labels] == [
        (first["noun"], "train"),
        (f"red {first['noun']}", "plain_only"),
    ]
    with (tmp_path / first["file"]).open("ab") as sprite:
        sprite.write(b"x")
    with pytest.raises(DataError, match="sha256 differs"):
        load_catalog(tmp_path)
