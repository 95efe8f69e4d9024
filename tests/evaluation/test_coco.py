"""The twelve numbers against the libraries themselves, fed the usual way: JSON annotations and a list of results."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coordexp.evaluation.coco import STAT_NAMES, coco_ap, detection_dataset, ground_truth_dataset
from evaluation.builders import ANIMALS, box, image, perfect_zoo, pred, random_results, table_of, with_predictions


def crowded_with_more_than_100_detections():
    rng = np.random.default_rng(5)
    corners = rng.uniform(0, 350, (150, 2))
    boxes = [(float(x), float(y), float(x) + 40, float(y) + 40) for x, y in corners]
    preds = [pred("cat", at, float(score)) for at, score in zip(boxes, rng.random(150).round(1), strict=True)]
    return [image(1, [("cat", at) for at in boxes[::3]], preds)], ANIMALS


CASES = {
    "plain": random_results(0),
    "ties": random_results(1, score_levels=3),
    "all scores equal": random_results(2, score_levels=1),
    "crowds": random_results(3, crowd_rate=0.3, score_levels=5),
    "many of one category": random_results(4, n_categories=2, max_gt=30, max_pred=40),
    "more than 100 detections": crowded_with_more_than_100_detections(),
    "perfect": (perfect_zoo(), ANIMALS),
    "no predictions": (with_predictions(perfect_zoo(), lambda p: []), ANIMALS),
    "no objects": ([image(1, [], [pred("cat", box(0, 0))])], ANIMALS),
    "nothing at all": ([image(1, [], [])], ANIMALS),
    "box of no area": ([image(1, [("cat", (5.0, 5.0, 5.0, 9.0))], [pred("cat", (5.0, 5.0, 5.0, 9.0))])], ANIMALS),
}


@pytest.fixture(params=CASES, name="table")
def _table(request):
    return table_of(*CASES[request.param])


def test_fast_path_equals_the_number_of_record(table):
    record, fast = coco_ap(table), coco_ap(table, "faster-coco-eval")
    assert (record.backend, fast.backend) == ("pycocotools", "faster-coco-eval")
    for name in STAT_NAMES:
        assert record.stats[name] == pytest.approx(fast.stats[name], abs=1e-9), name
    np.testing.assert_allclose(record.precision_TRKAM, fast.precision_TRKAM, atol=1e-9)


@pytest.mark.parametrize("case", ["plain", "ties", "crowds", "more than 100 detections"])
def test_equals_pycocotools_by_its_own_loader(case):
    table = table_of(*CASES[case])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ground_truth_dataset(table)
        truth.createIndex()
        keys = ("image_id", "category_id", "bbox", "score")
        found = truth.loadRes([{k: row[k] for k in keys} for row in detection_dataset(table)["annotations"]])
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    ours = coco_ap(table)
    expected = [None if value == -1 else pytest.approx(value, abs=1e-12) for value in evaluator.stats]
    assert [ours.stats[name] for name in STAT_NAMES] == expected
    np.testing.assert_array_equal(ours.precision_TRKAM, evaluator.eval["precision"])  # also categories without objects
    np.testing.assert_array_equal(ours.recall_TKAM, evaluator.eval["recall"])


def test_says_nothing_on_standard_output(capsys):
    for backend in ("pycocotools", "faster-coco-eval"):
        coco_ap(table_of(*CASES["plain"]), backend)
    assert capsys.readouterr().out == ""


def test_means_over_categories_come_from_the_same_numbers():
    table = table_of(*CASES["plain"])
    result = coco_ap(table)
    assert result.mean_ap() == pytest.approx(result.stats["mAP"], abs=1e-12)
    assert result.mean_ap(iou=0.5) == pytest.approx(result.stats["AP50"], abs=1e-12)
    assert np.mean(result.pr_curve(0.75)) == pytest.approx(result.stats["AP75"], abs=1e-12)
    assert result.mean_ap([5]) is None, "the last category is never annotated"
    rows = [0, 2, 3, 4]
    assert result.mean_ap(rows) == pytest.approx(np.mean([result.mean_ap([row]) for row in rows]))


def test_many_predictions_choose_the_fast_path(monkeypatch):
    monkeypatch.setattr("coordexp.evaluation.coco._FAST_FROM_PREDICTIONS", 10)
    result = coco_ap(table_of(perfect_zoo(), ANIMALS))
    assert result.backend == "faster-coco-eval"
    assert "12 predictions" in result.reason
