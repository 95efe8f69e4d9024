"""Which images a rule chooses, and that pictures show what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from skimage import data as skimage_data

from coordexp.errors import DataError
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.reporting.gallery import (
    EXAMPLE,
    FALSE,
    GALLERY,
    MISSED,
    RIGHT,
    GalleryPick,
    choose_images,
    write_example,
    write_gallery,
)
from coordexp.reporting.inputs import ReportInputs, load_report_data
from coordexp.reporting.outcomes import judge


def rows(**errors: tuple[int, int, int]) -> pd.DataFrame:
    """Per-image rows from `i<id>=(false, missed, duplicate pairs)`."""
    ids = pd.Index([int(name[1:]) for name in errors], name="image_id")
    return pd.DataFrame(list(errors.values()), ids, ["fp_50", "fn_50", "dup_pairs_90"])


STAGE2 = rows(
    i1=(0, 0, 0), i2=(5, 0, 4), i3=(0, 6, 0), i4=(0, 0, 0), i5=(3, 3, 2), i6=(0, 1, 0), i7=(0, 0, 0), i8=(9, 0, 9)
)
STAGE1 = rows(
    i1=(0, 0, 0), i2=(5, 0, 4), i3=(0, 6, 0), i4=(7, 0, 0), i5=(3, 3, 2), i6=(0, 1, 0), i7=(0, 2, 0), i8=(9, 0, 9)
)


def chosen(count: int, seed: int = 17) -> dict[str, list[int]]:
    """Image ids by rule."""
    picks = choose_images({"stage1": STAGE1, "stage2": STAGE2}, "dup_pairs_90", count, seed)
    by_rule: dict[str, list[int]] = {}
    for pick in picks:
        by_rule.setdefault(pick.rule, []).append(pick.image_id)
    return by_rule


def test_each_rule_takes_its_worst_and_no_image_twice() -> None:
    picked = chosen(8)
    assert picked["most duplicates"] == [8, 2]
    assert picked["most misses"] == [3, 5]
    assert picked["biggest change"] == [4, 7]
    assert sorted(picked["random"]) == [1, 6]


def test_the_random_rule_fills_in_for_a_rule_without_candidates() -> None:
    calm = rows(i1=(0, 0, 0), i2=(0, 0, 0), i3=(0, 0, 0), i4=(0, 0, 0))
    picks = choose_images({"stage1": calm, "stage2": calm}, "dup_pairs_90", 4, 17)
    assert [pick.rule for pick in picks] == ["random"] * 4
    assert sorted(pick.image_id for pick in picks) == [1, 2, 3, 4]


def test_asking_for_more_images_than_exist_selects_all() -> None:
    assert sum(len(ids) for ids in chosen(100).values()) == 8


def test_the_random_rule_follows_the_seed() -> None:
    calm = rows(**{f"i{n}": (0, 0, 0) for n in range(1, 200)})
    draws = [
        [p.image_id for p in choose_images({"stage1": calm, "stage2": calm}, "dup_pairs_90", 8, seed)]
        for seed in (17, 17, 18)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_files_are_named_by_image_and_the_random_ones_stay() -> None:
    """Where an answer changes, only the pictures that a rule newly chose are others."""
    calm = pd.DataFrame(0, pd.Index(range(1, 200), name="image_id"), ["fp_50", "fn_50", "dup_pairs_90"])

    def names(stage2: pd.DataFrame, rule: str) -> list[str]:
        picks = choose_images({"stage1": calm, "stage2": stage2}, "dup_pairs_90", 8, 17)
        return [pick.file_name for pick in picks if pick.rule == rule]

    drawn = names(calm, "random")
    assert len(drawn) == 8
    better, worse = calm.copy(), calm.copy()
    missed = [int(name.removesuffix(".png")) for name in drawn[:2]]
    better.loc[missed, "fn_50"], worse.loc[missed, "fn_50"] = [2, 1], [1, 2]  # the ranks change places
    assert set(names(better, "most misses")) == set(names(worse, "most misses")) == set(drawn[:2])
    assert names(better, "random") == names(worse, "random") == drawn[2:]


def test_tables_of_different_images_are_refused() -> None:
    with pytest.raises(DataError, match="different images"):
        choose_images({"stage1": STAGE1.iloc[1:], "stage2": STAGE2}, "dup_pairs_90", 4, 17)


def test_a_table_without_duplicates_is_refused() -> None:
    with pytest.raises(DataError, match=r"lacks \['dup_pairs_95'\]"):
        choose_images({"stage1": STAGE1, "stage2": STAGE2}, "dup_pairs_95", 4, 17)


def colours_in(path: Path) -> tuple[set[tuple[int, int, int]], tuple[int, int]]:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
        return {tuple(c) for c in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}, picture.size


def test_panels_show_the_three_outcomes_and_of_a_change_both_answers(inputs: ReportInputs, tmp_path: Path) -> None:
    data = load_report_data(inputs)
    outcomes = {name: judge(data.results[name], data.categories) for name in ("stage1", "stage2")}
    counts = data.per_image["stage2"][["tp_50", "fp_50", "fn_50"]]
    all_fates = int(counts[(counts > 0).all(axis=1)].index[0])
    picks = [GalleryPick(rule, all_fates) for rule in ("random", "biggest change")]
    for pick in picks:
        write_gallery([pick], outcomes, inputs.image_root, tmp_path / pick.rule)
    two, size_two = colours_in(tmp_path / "random" / f"{all_fates}.png")
    _, size_three = colours_in(tmp_path / "biggest change" / f"{all_fates}.png")
    assert {RIGHT.colour, FALSE.colour, MISSED.colour} <= two
    assert size_three[0] == size_two[0]  # the annotation is above the two answers
    assert size_three[1] > 1.5 * size_two[1]


def test_a_photograph_fits_the_budget_and_keeps_the_colours_of_the_boxes(tmp_path: Path) -> None:
    Image.fromarray(skimage_data.astronaut()).resize((640, 640)).crop((0, 0, 640, 480)).save(tmp_path / "photo.jpg")
    person, flag = (150.0, 0.0, 420.0, 480.0), (0.0, 0.0, 110.0, 300.0)
    gt = (GroundTruth("person", person), GroundTruth("flag", flag))
    pred = (Prediction("person", person, (0, 0, 0, 0), score=0.9), Prediction("rocket", flag, (0, 0, 0, 0), score=0.2))
    result = ImageResult(7, "photo.jpg", 640, 480, gt, pred, "", ParseReport(True, 2), "stop", 9)
    outcomes = {"stage2": judge([result], [Category(n, name) for n, name in enumerate(("person", "flag", "rocket"))])}
    pick = GalleryPick("random", 7)
    write_gallery([pick], outcomes, tmp_path, tmp_path / "gallery")
    drawn = tmp_path / "gallery" / pick.file_name
    assert drawn.stat().st_size <= GALLERY.max_bytes
    assert {RIGHT.colour, FALSE.colour, MISSED.colour} <= colours_in(drawn)[0]
    write_example(pick, outcomes, tmp_path, tmp_path / "example.png")
    assert (tmp_path / "example.png").stat().st_size <= 2 * EXAMPLE.max_bytes  # a photograph, at the last quality
