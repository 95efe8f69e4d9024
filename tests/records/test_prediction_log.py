"""The log of predictions resumes, keeps checkpoints apart, and turns into what COCO's own reader loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from coordexp.errors import DataError
from coordexp.records.prediction_log import PredictionLog, coco_predictions

ANSWER = {
    "width": 100,
    "height": 50,
    "objects": [{"desc": "cat", "bbox_xyxy_px": [1.5, 2.0, 11.5, 22.0], "score": 0.5}],
}
EMPTY = {"width": 10, "height": 10, "objects": []}


def test_a_second_log_knows_what_the_first_wrote(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    PredictionLog(path, "a").add("größe.jpg", ANSWER)
    again = PredictionLog(path, "a")
    again.add("2.jpg", EMPTY)
    assert list(PredictionLog(path, "a").rows) == ["größe.jpg", "2.jpg"]
    assert again.rows["größe.jpg"] == {"image": "größe.jpg", "checkpoint": "a", **ANSWER}


def test_a_line_cut_short_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    PredictionLog(path, "a").add("1.jpg", ANSWER)
    with path.open("a") as out:
        out.write('{"image": "2.jpg", "chec')
    log = PredictionLog(path, "a")
    assert list(log.rows) == ["1.jpg"]
    log.add("2.jpg", EMPTY)
    assert [json.loads(line)["image"] for line in path.read_text().splitlines()] == ["1.jpg", "2.jpg"]


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    PredictionLog(path, "a").add("1.jpg", ANSWER)
    with pytest.raises(DataError, match=r"out\.jsonl:1: predicted by a, not by b"):
        PredictionLog(path, "b")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(DataError, match=r"notes\.txt:1: no line of predictions"):
        PredictionLog(path, "a")
    assert path.read_text() == "hello\n"


def test_cocos_own_reader_loads_it(tmp_path: Path) -> None:
    rows = [{"image": "1.jpg", **ANSWER}, {"image": "2.jpg", **EMPTY}]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco_predictions(rows)))
    loaded = COCO(str(path))
    assert loaded.getImgIds() == [1, 2]
    (annotation,) = loaded.loadAnns(loaded.getAnnIds(imgIds=1, catIds=loaded.getCatIds(catNms=["cat"])))
    assert annotation["bbox"] == [1.5, 2.0, 10.0, 20.0]
    assert (annotation["area"], annotation["score"]) == (200.0, 0.5)
