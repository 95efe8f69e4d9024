"""The predictions file: exact round trip, and refusal of invalid lines."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.errors import DataError
from coordexp.records.gt_vs_pred import (
    GroundTruth,
    ImageResult,
    ParseReport,
    Prediction,
    read_results,
    write_results,
)

RESULT = ImageResult(
    image_id=7,
    image="images/val/7.jpg",
    width=640,
    height=480,
    gt=(
        GroundTruth("black cat", (70.4, 148.8, 262.4, 338.4), area_px2=20702.105749999998),
        GroundTruth("cat", (0.0, 0.0, 640.0, 480.0), True),
    ),
    pred=(
        Prediction(
            "black cat", (76.8, 144.0, 268.8, 336.0), (120, 300, 420, 700), (-0.1, -0.2, -0.3, -0.4), -0.5, 0.78
        ),
        Prediction("dog", (1.0, 1.0, 2.0, 2.0), (1, 2, 3, 4)),
    ),
    raw_text='{"objects": [é猫]}<|im_end|>',
    parse=ParseReport(True, 2, {"bbox_invalid": 1}, truncated=True),
    finish_reason="length",
    n_generated_tokens=41,
    identity={"model": "abc"},
)
boxes = st.tuples(*[st.floats(0, 500)] * 4).map(lambda v: (v[0], v[1], v[0] + v[2], v[1] + v[3]))
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scores = st.none() | st.floats(0, 1)
predictions = st.builds(
    Prediction,
    words,
    boxes,
    st.tuples(*[st.integers(0, 1000)] * 4),
    st.none() | st.tuples(*[st.floats(-50, 0)] * 4),
    scores,
    scores,
)
ground_truths = st.builds(GroundTruth, words, boxes, st.booleans(), st.none() | st.floats(0, 1e10))


def changed(**changes) -> dict:
    row = json.loads(json.dumps(RESULT.to_json()))
    return {key: value for key, value in (row | changes).items() if value is not ...}


def test_round_trip(tmp_path):
    assert write_results(tmp_path / "r.jsonl", [RESULT]) == 1
    assert list(read_results(tmp_path / "r.jsonl")) == [RESULT]


def test_only_annotated_areas_are_written():
    assert ["area_px2" in row for row in RESULT.to_json()["gt"]] == [True, False]


@settings(max_examples=30)
@given(st.lists(predictions, max_size=4), st.lists(ground_truths, max_size=4), words)
def test_every_number_is_read_back_exactly(tmp_path_factory, pred, gt, raw_text):
    result = ImageResult(1, "a", 10, 10, tuple(gt), tuple(pred), raw_text, ParseReport(True, len(pred)), "stop", 3)
    path = tmp_path_factory.mktemp("r") / "r.jsonl"
    write_results(path, [result])
    assert list(read_results(path)) == [result]


@pytest.mark.parametrize(
    ("report", "ok"),
    [
        (ParseReport(True, 3), True),
        (ParseReport(True, 0), True),
        (ParseReport(False, 0), False),
        (ParseReport(True, 3, truncated=True), False),
        (ParseReport(True, 3, {"wrong_arity": 1}), False),
    ],
)
def test_an_answer_is_ok_if_it_is_found_closed_and_complete(report, ok):
    assert report.ok is ok


FIRST_PRED = RESULT.to_json()["pred"][0]
BROKEN = {
    "a list": [1],
    "no image": changed(image=...),
    "no parse": changed(parse=...),
    "unknown parse counter": changed(parse={"container_found": True, "n_valid": 1, "lost": 1}),
    "image id no number": changed(image_id="seven"),
    "prediction without bins": changed(pred=[{k: v for k, v in FIRST_PRED.items() if k != "bins"}]),
    "box of three": changed(pred=[FIRST_PRED | {"bbox_xyxy_px": [1, 2, 3]}]),
    "box of words": changed(pred=[FIRST_PRED | {"bbox_xyxy_px": ["a", "b", "c", "d"]}]),
    "box with NaN": changed(pred=[FIRST_PRED | {"bbox_xyxy_px": [1, float("nan"), 3, 4]}]),
    "inverted box": changed(gt=[{"desc": "cat", "bbox_xyxy_px": [3, 2, 1, 4]}]),
    "area no number": changed(gt=[{"desc": "cat", "bbox_xyxy_px": [1, 2, 3, 4], "area_px2": "2"}]),
    "negative area": changed(gt=[{"desc": "cat", "bbox_xyxy_px": [1, 2, 3, 4], "area_px2": -2}]),
    "no box": changed(gt=[{"desc": "cat", "bbox_xyxy_px": None}]),
    "same image again": changed(),
}


@pytest.mark.parametrize("row", BROKEN.values(), ids=BROKEN.keys())
def test_errors_of_invalid_lines_name_file_and_line(tmp_path, row):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(changed()) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"r\.jsonl:2: "):
        list(read_results(path))


def test_a_file_truncated_within_a_character_is_an_error_with_the_line(tmp_path):
    path = tmp_path / "r.jsonl"
    write_results(path, [RESULT])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index("猫".encode()) + 1])
    with pytest.raises(DataError, match=r"r\.jsonl:2: .*truncated"):
        list(read_results(path))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "r.jsonl").touch()
    with pytest.raises(DataError, match="no predictions"):
        list(read_results(tmp_path / "r.jsonl"))


def test_numbers_that_json_cannot_represent_are_not_written(tmp_path):
    broken = Prediction("cat", (0, 0, 1, 1), (0, 0, 1, 1), score=float("nan"))
    result = ImageResult(1, "a", 10, 10, (), (broken,), "", ParseReport(True, 1), "stop", 3)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path / "r.jsonl", [result])


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), (0, False), (True, True), (None, False)])
def test_a_crowd_flag_may_be_text(tmp_path, value, expected):
    gt = [{"desc": "cat", "bbox_xyxy_px": [1, 2, 3, 4], "iscrowd": value}]
    (tmp_path / "r.jsonl").write_text(json.dumps(changed(gt=gt)))
    (result,) = read_results(tmp_path / "r.jsonl")
    assert result.gt[0].iscrowd is expected


def test_an_invalid_crowd_flag_is_refused(tmp_path):
    gt = [{"desc": "cat", "bbox_xyxy_px": [1, 2, 3, 4], "iscrowd": "maybe"}]
    (tmp_path / "r.jsonl").write_text(json.dumps(changed(gt=gt)))
    with pytest.raises(DataError, match=r"r\.jsonl:1.*iscrowd is 'maybe' \(text\): expected 0 or 1"):
        list(read_results(tmp_path / "r.jsonl"))
