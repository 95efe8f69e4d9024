from __future__ import annotations

import numpy as np
import pytest

from coordexp.evaluation.ceiling import codec_ceiling
from coordexp.records.schema import ObjectRecord, Record
from evaluation.builders import FAST


def record(*boxes, width=1000, height=1000):
    return Record("a.jpg", width, height, tuple(ObjectRecord(f"kind {i % 3}", box) for i, box in enumerate(boxes)))


def test_boxes_on_the_bins_lose_nothing():
    ceiling = codec_ceiling([record((0.0, 10.0, 500.0, 999.0), (7.0, 7.0, 8.0, 8.0))], FAST)
    assert [ceiling[key] for key in ("mAP", "f1_95", "mean_iou", "min_iou")] == pytest.approx([1] * 4)


def test_a_small_box_off_the_grid():
    """[100.4, 111.2] comes back as [100, 111]."""
    ceiling = codec_ceiling([record((100.4, 100.4, 111.2, 111.2))], FAST)
    overlap = (111 - 100.4) ** 2
    iou = pytest.approx(overlap / (10.8**2 + 11**2 - overlap))
    assert ceiling["mean_iou"] == iou
    # IoU .897 passes the eight thresholds up to .85.
    of_size = {"mAP": pytest.approx(0.8), "AP75": pytest.approx(1), "AP90": 0.0, "f1_95": 0.0}
    assert ceiling["by_area"] == [{"size": "small", "n": 1, **of_size, "mean_iou": iou, "share_95": 0.0}]
    assert ceiling["by_side_px"][0]["size"] == "8-16"
    assert (ceiling["f1_75"], ceiling["f1_95"]) == (1, 0)


def test_small_boxes_lose_most():
    rng = np.random.default_rng(0)
    records = []
    for side in (6.0, 12.0, 24.0, 100.0):
        corners = rng.uniform(0, 1200, (200, 2))
        records += [record((x, y, x + side, y + side), width=1333, height=1333) for x, y in corners]
    ceiling = codec_ceiling(records, FAST)
    means = [row["mean_iou"] for row in ceiling["by_side_px"]]
    assert [row["size"] for row in ceiling["by_side_px"]] == ["<8", "8-16", "16-32", "64-128"]
    assert means == sorted(means)
    for key in ("mAP", "f1_95"):
        by_size = [row[key] for row in ceiling["by_side_px"]]
        assert by_size == sorted(by_size)
        assert by_size[0] < ceiling[key] < by_size[-1]
    assert means[0] < 0.9 < means[-1]
    assert sum(row["n"] for row in ceiling["by_area"]) == ceiling["n_objects"] == 800
    assert ceiling["AP50"] == pytest.approx(1)
    assert ceiling["f1_95"] < ceiling["f1_75"] <= 1


def test_without_objects_nothing_is_scored():
    region = ObjectRecord("cat", (0.0, 0.0, 50.0, 50.0), metadata={"iscrowd": 1})
    crowd = Record("b.jpg", 100, 100, (region,))
    for records in ([record()], [crowd, record()]):
        ceiling = codec_ceiling(records, FAST)
        assert (ceiling.pop("n_images"), ceiling.pop("n_objects")) == (len(records), 0)
        assert ceiling.pop("by_area") == ceiling.pop("by_side_px") == []
        assert set(ceiling.values()) == {None}
