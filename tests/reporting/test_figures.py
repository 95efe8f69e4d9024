"""What can be said of figures without looking: intervals are right, and poor data does not stop a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.reporting.figures_evaluation import wilson, write_evaluation_figures
from coordexp.reporting.figures_training import write_training_figures
from coordexp.reporting.inputs import ReportInputs, load_report_data
from coordexp.reporting.outcomes import judge


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (3, 7), (90, 400), (0, 1)])
def test_wilson_equals_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def image(image_id: int, pred: tuple[Prediction, ...]) -> ImageResult:
    gt = (GroundTruth("$a$ & <b>", (2.0, 2.0, 20.0, 20.0)),)
    report = ParseReport(True, len(pred))
    return ImageResult(image_id, "x.jpg", 64, 64, gt, pred, "", report, "stop", 1)


def test_checkpoints_that_predict_nothing_or_nothing_right_still_have_figures(tmp_path: Path) -> None:
    categories = [Category(1, "$a$ & <b>"), Category(2, "dog")]
    silent = judge([image(1, ()), image(2, ())], categories)
    wrong = Prediction("dog", (2.0, 2.0, 20.0, 20.0), (0, 0, 0, 0), score=-3.5)
    poor = judge([image(1, (wrong,)), image(2, (wrong,))], categories)
    curve = {"recall": np.linspace(0, 1, 101).tolist(), "precision_50": [0.0] * 101, "precision_75": []}
    outcomes = {"base": silent, "stage1": silent, "stage1-control": silent, "stage2": poor}
    write_evaluation_figures(outcomes, dict.fromkeys(outcomes, curve), tmp_path)
    write_evaluation_figures(dict.fromkeys(outcomes, silent), dict.fromkeys(outcomes, curve), tmp_path)
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
    assert len(list(tmp_path.iterdir())) == 5


def test_an_experiment_with_another_weight_has_two_floors(inputs: ReportInputs, tmp_path: Path) -> None:
    data = load_report_data(inputs)
    weights = {**inputs.params, "softce_weight": 0.2}
    stage2 = data.logs["stage2"]
    columns = {**stage2.columns, "loss/softce": 0.2 * stage2.columns["raw/softce"]}
    logs = {**data.logs, "stage2": dataclasses.replace(stage2, columns=columns)}
    write_training_figures(logs, weights, tmp_path / "weighted")
    write_training_figures(data.logs, inputs.params, tmp_path / "default")
    same = {
        path.name: path.read_bytes() == (tmp_path / "default" / path.name).read_bytes()
        for path in (tmp_path / "weighted").iterdir()
    }
    assert same == {"stage1_losses.png": True, "stage2_losses.png": False, "bin_mae.png": True}
