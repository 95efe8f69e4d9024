"""Every row of BAD_INPUT is provoked: its error has the words that the documents promise, or its counter counts."""

from __future__ import annotations

import json
import math

import pytest

from coordexp.errors import DataError
from coordexp.evaluation.input_checks import BAD_INPUT, check_known_images
from coordexp.evaluation.semantics import map_descriptions
from coordexp.records.gt_vs_pred import ImageResult, read_results
from evaluation.builders import ANIMALS, box, image, perfect_zoo, pred, run
from evaluation.test_semantics import INDEX, SEMANTIC, Compass

LINE = json.dumps(image(1, [("cat", box(0, 0))], [pred("cat", box(0, 0))]).to_json())


def with_box(values: str) -> str:
    row = json.loads(LINE)
    row["pred"][0]["bbox_xyxy_px"] = json.loads(values)
    return json.dumps(row) + "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no predictions in the file"),
        (LINE + "\n" + LINE.replace('"image_id": 1', '"image_id": 2')[:-20], "jsonl:2: the last line is cut"),
        ("{}\n", "jsonl:1: not a gt_vs_pred line"),
        ("not json\n", "jsonl:1: not valid JSON"),
        (LINE + "\n" + LINE + "\n", "image id 1 appears twice"),
        (with_box("[NaN, 0, 1, 1]"), "expected four finite pixels"),
        (with_box("[0, 0, Infinity, 1]"), "expected four finite pixels"),
        (with_box("[5, 0, 4, 1]"), "x2 >= x1 and y2 >= y1"),
        (with_box("[0, 5, 1, 4]"), "x2 >= x1 and y2 >= y1"),
        (with_box("[0, 5, 1]"), "expected four finite pixels"),
        (LINE.replace('"iscrowd"', '"area_px2": -1, "iscrowd"') + "\n", "jsonl:1: gt[0]: area_px2 is -1"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(tmp_path, text: str, words: str):
    file = tmp_path / "gt_vs_pred.jsonl"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        list(read_results(file))
    assert words in str(error.value)


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_prediction_without_a_finite_score_is_refused(score):
    with pytest.raises(DataError, match=r"pred\[0\] has score .*AP needs a finite score"):
        run([image(1, [], [pred("cat", box(0, 0), score)])])


def test_an_annotated_name_outside_the_categories_is_refused():
    with pytest.raises(DataError, match="annotated object 'wolf' is none of the 3 categories"):
        run([image(1, [("wolf", box(0, 0))], [])])


def test_an_image_that_the_annotations_do_not_hold_is_refused():
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


def test_what_a_model_may_well_answer_is_counted_and_judged():
    assert odd() == {}
    assert odd(at=(300.0, 300.0, 300.0, 340.0)) == {"zero_area_boxes": 1}
    assert odd(at=(380.0, 300.0, 401.5, 340.0)) == {"outside_boxes": 1}
    assert odd(at=(380.0, 300.0, 400.5, 340.0)) == {}
    assert odd(desc="barn\x07owl\n") == {"control_char_descs": 1, "names_normalised": 1}
    assert odd(desc=" () ") == {"empty_descs": 1, "names_unmapped": 1}
    assert odd(desc="wolf") == {"names_unmapped": 1}
    assert odd(score=1.5) == {"scores_outside_unit": 1}
    assert odd(score=-0.1) == {"scores_outside_unit": 1}


def test_a_description_near_two_names_alike_is_ambiguous():
    found = map_descriptions(["fox"], INDEX, SEMANTIC, Compass(fox=(0.6, 0.6, 0.0)))
    assert found["fox"][1] == "ambiguous"


def test_the_list_names_metrics_that_exist():
    metrics = run(perfect_zoo()).metrics
    counters = [word.strip("`;") for row in BAD_INPUT for word in row.outcome.split() if word.startswith("`")]
    assert counters
    assert {key.split(".")[1] for key in counters} <= metrics["input"].keys()
    assert all(row.outcome.startswith(("error", "`input.")) for row in BAD_INPUT)
