from __future__ import annotations

import numpy as np
import pytest

from coordexp.evaluation.details import SIDE_EDGES_PX, bucket, side_label
from coordexp.records.gt_vs_pred import GroundTruth
from evaluation.builders import box, image, pred, run


def test_labels_name_their_buckets():
    sides = np.array([1.0, 7.9, 8.0, 15.9, 200.0, 256.0, 999.0])
    labels = [side_label(number) for number in bucket(sides, SIDE_EDGES_PX)]
    assert labels == ["<8", "<8", "8-16", "8-16", "128-256", ">=256", ">=256"]


def test_recall_by_side():
    """Two objects of 20 px, one found at IoU 0.6 under a wrong name; one of 50 px found; and a crowd."""
    small, near, large = box(0, 0, 20.0), (10.0, 10.0, 22.0, 30.0), box(0, 1, 50.0)
    crowd = GroundTruth("cat", (200.0, 200.0, 400.0, 400.0), iscrowd=True)
    objects = [("cat", small), ("cat", box(2, 0, 20.0)), ("dog", large), crowd]
    rows = run([image(1, objects, [pred("dog", near), pred("dog", large)])]).details["by_side_px"]
    assert rows == [
        {
            "side_px": "16-32",
            "n_gt": 2,
            "recall_50": 0.5,
            "recall_75": 0.0,
            "recall_95": 0.0,
            "mean_iou": pytest.approx(0.6),
            "sem_acc": 0.0,
        },
        {"side_px": "32-64", "n_gt": 1, **dict.fromkeys(("recall_50", "recall_75", "recall_95"), 1.0)}
        | {"mean_iou": 1.0, "sem_acc": 1.0},
    ]
