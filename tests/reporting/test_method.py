"""The figure of the method shows a real answer, its real matching, and is left out without distributions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coordexp.geometry.bins import box_scale
from coordexp.matching.matcher import match
from coordexp.reporting.inputs import ReportInputs, load_report_data
from coordexp.reporting.method import OBJECTS, choose_method, write_method
from coordexp.reporting.outcomes import judge


def test_the_answer_is_whole_small_and_matched_as_in_training(inputs: ReportInputs, tmp_path: Path) -> None:
    data, matching, seed = load_report_data(inputs), inputs.run.params.matching, inputs.run.params.seed
    outcome = judge(data.results["stage2"], data.categories)
    method = choose_method(outcome, data.distributions, matching, seed)
    assert method is not None
    assert method.result in data.results["stage2"]
    assert method.result.parse is not None
    assert method.result.parse.ok
    assert len(method.boxes) == len(method.result.pred) in OBJECTS
    scale = box_scale(method.result.width, method.result.height)
    pred = np.array([p.boxes_xyxy_px["expectation"] for p in method.result.pred]) / scale
    gt = np.array([g.bbox_xyxy_px for g in method.result.gt]) / scale
    assert method.matched.pairs.tolist() == match(pred, gt, matching).pairs.tolist()
    assert method.strip.image_id == method.result.image_id
    write_method(method, data.distributions, matching, inputs.image_root, tmp_path / "method.png")
    assert (tmp_path / "method.png").stat().st_size < 150_000
    again = choose_method(outcome, data.distributions, matching, seed)
    assert again is not None
    assert again.result == method.result


def test_without_distributions_there_is_no_figure(inputs: ReportInputs) -> None:
    data = load_report_data(inputs)
    outcome = judge(data.results["stage2"], data.categories)
    assert choose_method(outcome, {}, inputs.run.params.matching, 17) is None
