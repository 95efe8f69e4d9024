from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from coordexp.errors import DataError
from coordexp.evaluation.table import BAD_INPUT, check_known_images, image_slices
from coordexp.records.gt_vs_pred import ImageResult, read_results
from evaluation.builders import ANIMALS, box, image, perfect_zoo, pred, run, table_of


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
def test_invalid_input_is_reported(results, message):
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


LINE = json.dumps(image(1, [("cat", box(0, 0))], [pred("cat", box(0, 0))]).to_json())


def with_box(values: str) -> str:
    row = json.loads(LINE)
    row["pred"][0]["bbox_xyxy_px"] = json.loads(values)
    return json.dumps(row) + "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no predictions in the file"),
        (LINE + "\n" + LINE.replace('"image_id": 1', '"image_id": 2')[:-20], "jsonl:2: not valid JSON"),
        ("{}\n", "jsonl:1: image_id is missing"),
        ("not json\n", "jsonl:1: not valid JSON"),
        (LINE + "\n" + LINE + "\n", "image id 1 appears twice"),
        (with_box("[NaN, 0, 1, 1]"), "NaN is not a number"),
        (with_box("[0, 0, Infinity, 1]"), "Infinity is not a number"),
        (with_box("[5, 0, 4, 1]"), "x2 >= x1 and y2 >= y1"),
        (with_box("[0, 5, 1, 4]"), "x2 >= x1 and y2 >= y1"),
        (with_box("[0, 5, 1]"), "pred[0].bbox_xyxy_px[3] is missing"),
        (LINE.replace('"iscrowd"', '"area_px2": -1, "iscrowd"') + "\n", "jsonl:1: gt[0].area_px2 is -1"),
    ],
)
def test_an_untrustworthy_file_is_rejected(tmp_path, text: str, words: str):
    file = tmp_path / "gt_vs_pred.jsonl"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        list(read_results(file))
    assert words in str(error.value)


def test_an_image_that_is_not_annotated_is_rejected():
    check_known_images(perfect_zoo(3), {1, 2, 3, 4}, "val.jsonl")
    with pytest.raises(DataError, match=r"Image id 2 is not in the annotations val.jsonl \(2 such images of 3\)"):
        check_known_images(perfect_zoo(3), {1}, "val.jsonl")


def odd(desc: str = "cat", at=None, score: float = 0.9) -> dict[str, float]:
    """The metrics of the `input` area, and F1, when one odd prediction joins a perfect one."""
    results: list[ImageResult] = [
        image(1, [("cat", box(0, 0))], [pred("cat", box(0, 0)), pred(desc, at or box(3, 3), score)])
    ]
    metrics = run(results, ANIMALS).metrics
    assert metrics["coco"]["n_pred"] == 2, "counted, and judged"
    assert (metrics["f1"]["tp_50"], metrics["f1"]["fp_50"]) == (1, 1)
    return {key: n for key, n in metrics["input"].items() if n and key != "names_exact"}


def test_plausible_odd_answers_are_counted_and_evaluated():
    assert odd() == {}
    assert odd(at=(300.0, 300.0, 300.0, 340.0)) == {"zero_area_boxes": 1}
    assert odd(at=(380.0, 300.0, 401.5, 340.0)) == {"outside_boxes": 1}
    assert odd(at=(380.0, 300.0, 400.5, 340.0)) == {}
    assert odd(desc="barn\x07owl\n") == {"control_char_descs": 1, "names_normalised": 1}
    assert odd(desc=" () ") == {"empty_descs": 1, "names_unmapped": 1}
    assert odd(desc="wolf") == {"names_unmapped": 1}
    assert odd(score=1.5) == {"scores_outside_unit": 1}
    assert odd(score=-0.1) == {"scores_outside_unit": 1}


def test_the_list_names_metrics_that_exist():
    metrics = run(perfect_zoo()).metrics
    counters = [word.strip("`;") for row in BAD_INPUT for word in row.outcome.split() if word.startswith("`")]
    assert counters
    assert {key.split(".")[1] for key in counters} <= metrics["input"].keys()
    assert all(row.outcome.startswith(("error", "`input.")) for row in BAD_INPUT)
