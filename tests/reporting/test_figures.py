"""What can be said of figures without looking: intervals are right, and poor data does not stop a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from coordexp.evaluation.effect import Verdict
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.reporting.figures_coordinates import RULES, bin_errors, choose_strips
from coordexp.reporting.figures_evaluation import write_evaluation_figures
from coordexp.reporting.figures_training import write_training_figures
from coordexp.reporting.forest import write_forest
from coordexp.reporting.inputs import ReportInputs, load_report_data
from coordexp.reporting.outcomes import Outcomes, judge
from coordexp.reporting.style import new_figure, save_figure
from reporting.synthetic import changed


def image(image_id: int, pred: tuple[Prediction, ...]) -> ImageResult:
    gt = (GroundTruth("$a$ & <b>", (2.0, 2.0, 20.0, 20.0)),)
    report = ParseReport(True, len(pred))
    return ImageResult(image_id, "x.jpg", 64, 64, gt, pred, "", report, "stop", 1)


def test_checkpoints_without_predictions_still_have_figures(inputs: ReportInputs, tmp_path: Path) -> None:
    categories = [Category(1, "$a$ & <b>"), Category(2, "dog")]
    silent = judge([image(1, ()), image(2, ())], categories)
    wrong = Prediction("dog", (2.0, 2.0, 20.0, 20.0), (0, 0, 0, 0), score=-3.5)
    poor = judge([image(1, (wrong,)), image(2, (wrong,))], categories)
    curve = {"recall": np.linspace(0, 1, 101).tolist(), "precision_50": [0.0] * 101, "precision_75": []}
    data = load_report_data(inputs)
    data = dataclasses.replace(data, pr_curves=dict.fromkeys(data.pr_curves, curve))
    outcomes = {"base": silent, "stage1": silent, "stage1-control": silent, "stage2": poor}
    write_evaluation_figures(data, outcomes, tmp_path)
    write_evaluation_figures(data, dict.fromkeys(outcomes, silent), tmp_path)
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
    assert len(list(tmp_path.iterdir())) == 5


def test_a_line_that_others_hide_keeps_its_color_in_the_legend(tmp_path: Path) -> None:
    """Of few colors, the most frequent ones would leave it out."""
    colours = ("#123456", "#D55E00", "#0072B2")
    figure = new_figure(8, 3, 100)
    axes = figure.subplots()
    for colour in colours:
        axes.plot(np.arange(50) % 7, color=colour, linewidth=4, label=colour)
    for alpha in np.linspace(0.1, 0.9, 40):
        axes.axvspan(100 * alpha, 100 * alpha + 2, color=(alpha, 0.5, 1 - alpha))
    axes.legend()
    save_figure(figure, tmp_path / "few.png", 6)
    with Image.open(tmp_path / "few.png") as picture:
        assert len(picture.getcolors()) <= 12
        shown = {f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b) in picture.convert("RGB").getcolors(1 << 16)}
    assert shown >= {*colours}


def test_an_experiment_with_another_weight_has_two_lower_bounds(inputs: ReportInputs, tmp_path: Path) -> None:
    data = load_report_data(inputs)
    weights, stage2 = changed(inputs.run.params, softce_weight=0.2), data.logs["stage2"]
    logs = {**data.logs, "stage2": stage2.assign(**{"loss/softce": 0.2 * stage2["raw/softce"]})}
    write_training_figures(logs, weights, tmp_path / "weighted")
    write_training_figures(data.logs, inputs.run.params, tmp_path / "default")
    same = {
        path.name: path.read_bytes() == (tmp_path / "default" / path.name).read_bytes()
        for path in (tmp_path / "weighted").iterdir()
    }
    assert same == {"stage1_losses.png": True, "stage2_losses.png": False, "bin_mae.png": True}


def outcome(n_images: int, *, distributions: bool) -> Outcomes:
    """Images of 200 x 100 px; the box of image i is i px off at its left edge, and i + 1 bins wide in spirit."""
    results = []
    for i in range(1, n_images + 1):
        truth, box = (20.0, 10.0, 120.0, 90.0), (20.0 + i, 10.0, 120.0, 90.0)
        extra = {"coord_sd_bins": (10.0 * i, 1.0, 1.0, 1.0), "boxes_xyxy_px": {"expectation": box}}
        pred = Prediction("cat", box, (100 + 5 * i, 100, 600, 900), score=0.5, **(extra if distributions else {}))
        results.append(
            ImageResult(
                i, f"{i}.jpg", 200, 100, (GroundTruth("cat", truth),), (pred,), "", ParseReport(True, 1), "stop", 9
            )
        )
    return judge(results, [Category(1, "cat")])


def test_an_error_of_one_pixel_in_two_hundred_is_five_bins() -> None:
    np.testing.assert_allclose(bin_errors(outcome(2, distributions=False)), [[5, 0, 0, 0], [10, 0, 0, 0]])


def test_strips_follow_their_rules_and_show_a_box_once() -> None:
    strips = choose_strips(outcome(8, distributions=True), per_rule=1)
    assert [s.rule for s in strips] == list(RULES)
    assert len({s.image_id for s in strips}) == 4
    widest, largest = strips[0], strips[1]
    assert (widest.image_id, widest.slot, widest.sd_bins) == (8, "x1", 80.0)
    assert (largest.image_id, largest.emitted_bin - largest.true_bin) == (7, 35.0)  # 8 is taken


def test_no_distribution_on_file_gives_no_strip() -> None:
    assert choose_strips(outcome(3, distributions=False)) == []


def test_an_edge_on_the_border_is_narrowest_only_where_there_is_no_other() -> None:
    """All widths are 1 but those of x1; y1 = 10 of 100 px is bin 100, far from a border; one image touches it."""
    inner = outcome(3, distributions=True)
    touching = dataclasses.replace(inner.results[0], gt=(GroundTruth("cat", (20.0, 0.0, 120.0, 90.0)),), image_id=9)
    touching = dataclasses.replace(touching, pred=(dataclasses.replace(
        touching.pred[0], bbox_xyxy_px=(20.0, 0.0, 120.0, 90.0), coord_sd_bins=(9.0, 0.1, 9.0, 9.0)),))  # fmt: skip
    both = judge([*inner.results, touching], [Category(1, "cat")])
    [narrowest] = [s for s in choose_strips(both, per_rule=1) if s.rule == "narrowest"]
    assert narrowest.sd_bins == 1.0


class Found(NamedTuple):
    delta: float
    lo: float
    hi: float
    verdict: Verdict = Verdict.NO_DIFFERENCE


def test_a_forest_has_a_row_per_difference_that_varies(tmp_path: Path) -> None:
    some, none = Found(0.1, -0.1, 0.3), Found(0.0, 0.0, 0.0, Verdict.IDENTICAL)
    keys = ("coco.mAP", "coco.AP50", "f1.full_50")
    heights = []
    for found in ({}, {"coco.mAP": some}, {"coco.mAP": some, "coco.AP50": none}, dict.fromkeys(keys, some)):
        write_forest(tmp_path / "forest.png", {"B - A": found, "C - A": {"coco.mAP": None}}, keys)
        with Image.open(tmp_path / "forest.png") as picture:
            heights.append(picture.height)
    assert heights[0] == heights[1] == heights[2] < heights[3]
