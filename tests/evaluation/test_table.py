from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from coordexp.errors import DataError
from coordexp.evaluation.table import image_slices
from evaluation.builders import ANIMALS, box, image, perfect_zoo, pred, table_of


def broken(**change):
    return replace(image(5, [("cat", box(0, 0))], [pred("cat", box(0, 0)), pred("cat", box(1, 0))]), **change)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "no images"),
        ([broken(), broken()], "Image id 5 appears twice"),
        (
            [broken(pred=(pred("cat", box(0, 0)), pred("cat", box(0, 0), None)))],
            r"Image 5 \(005.jpg\): pred\[1\].*None",
        ),
        ([broken(pred=(pred("cat", box(0, 0), math.nan),))], r"pred\[0\] has score nan"),
        ([broken(pred=(pred("cat", (0.0, 0.0, math.nan, 1.0)),))], "Image 5 .* pred box .*nan"),
        ([broken(pred=(pred("cat", (9.0, 0.0, 3.0, 1.0)),))], "pred box"),
        ([image(5, [("cat", (0.0, 9.0, 3.0, 1.0))], [])], "gt box"),
        ([image(5, [("unicorn", box(0, 0))], [])], "'unicorn' is none of the 3 categories"),
        ([broken(width=0)], "size 0x400"),
    ],
)
def test_broken_input_is_named(results, message):
    with pytest.raises(DataError, match=message):
        table_of(results, ANIMALS)


def test_images_are_sorted_and_predictions_keep_their_order():
    results = [
        image(9, [], [pred("cat", box(1, 0), 0.1), pred("dog", box(0, 0), 0.9)]),
        image(2, [("dog", box(0, 0))], []),
    ]
    table = table_of(results, ANIMALS)
    assert table.image_ids_I.tolist() == [2, 9]
    assert table.pred_score_P.tolist() == [0.1, 0.9]
    assert (table.n_gt_I.tolist(), table.n_pred_I.tolist()) == ([1, 0], [0, 2])
    assert image_slices(table.pred_image_P, 2) == [slice(0, 0), slice(0, 2)]


def test_keeping_predictions_leaves_the_ground_truth():
    table = table_of(perfect_zoo(), ANIMALS)
    kept = table.keep_predictions(table.pred_category_P == 1)
    assert kept.n_pred_I.tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(kept.gt_boxes_G4, table.gt_boxes_G4)
