from __future__ import annotations

import numpy as np
import pytest

from coordexp.evaluation.upper_bound import codec_upper_bound
from coordexp.records.schema import ObjectRecord, Record


def record(*boxes, width=1000, height=1000):
    return Record("a.jpg", width, height, tuple(ObjectRecord(f"kind {i % 3}", box) for i, box in enumerate(boxes)))


def test_boxes_on_bin_positions_have_no_quantization_error():
    upper_bound = codec_upper_bound([record((0.0, 10.0, 500.0, 999.0), (7.0, 7.0, 8.0, 8.0))])
    assert [upper_bound[key] for key in ("mAP", "f1_95", "mean_iou", "min_iou")] == pytest.approx([1] * 4)


def test_a_small_box_off_the_grid():
    """[100.4, 111.2] comes back as [100, 111]."""
    upper_bound = codec_upper_bound([record((100.4, 100.4, 111.2, 111.2))])
    overlap = (111 - 100.4) ** 2
    iou = pytest.approx(overlap / (10.8**2 + 11**2 - overlap))
    assert upper_bound["mean_iou"] == iou
    # IoU .897 passes the eight thresholds up to .85.
    of_size = {"mAP": pytest.approx(0.8), "AP75": pytest.approx(1), "AP90": 0.0, "f1_95": 0.0}
    assert upper_bound["by_area"] == [{"size": "small", "n": 1, **of_size, "mean_iou": iou, "share_95": 0.0}]
    assert upper_bound["by_side_px"][0]["size"] == "8-16"
    assert (upper_bound["f1_75"], upper_bound["f1_95"]) == (1, 0)


def test_small_boxes_have_the_largest_quantization_loss():
    rng = np.random.default_rng(0)
    records = []
    for side in (6.0, 12.0, 24.0, 100.0):
        corners = rng.uniform(0, 1200, (200, 2))
        records += [record((x, y, x + side, y + side), width=1333, height=1333) for x, y in corners]
    upper_bound = codec_upper_bound(records)
    means = [row["mean_iou"] for row in upper_bound["by_side_px"]]
    assert [row["size"] for row in upper_bound["by_side_px"]] == ["<8", "8-16", "16-32", "64-128"]
    assert means == sorted(means)
    for key in ("mAP", "f1_95"):
        by_size = [row[key] for row in upper_bound["by_side_px"]]
        assert by_size == sorted(by_size)
        assert by_size[0] < upper_bound[key] < by_size[-1]
    assert means[0] < 0.9 < means[-1]
    assert sum(row["n"] for row in upper_bound["by_area"]) == upper_bound["n_objects"] == 800
    assert upper_bound["AP50"] == pytest.approx(1)
    assert upper_bound["f1_95"] < upper_bound["f1_75"] <= 1


def test_without_objects_scores_are_undefined():
    region = ObjectRecord("cat", (0.0, 0.0, 50.0, 50.0), metadata={"iscrowd": 1})
    crowd = Record("b.jpg", 100, 100, (region,))
    for records in ([record()], [crowd, record()]):
        upper_bound = codec_upper_bound(records)
        assert (upper_bound.pop("n_images"), upper_bound.pop("n_objects")) == (len(records), 0)
        assert upper_bound.pop("by_area") == upper_bound.pop("by_side_px") == []
        assert set(upper_bound.values()) == {None}
