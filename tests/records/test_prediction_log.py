"""The prediction log can be resumed, detects outdated answers, and exports a file that pycocotools reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from coordexp.errors import DataError
from coordexp.records.prediction_log import AnswerSource, PredictionLog, coco_predictions, read_rows

ANSWER = {
    "width": 100,
    "height": 50,
    "objects": [{"desc": "cat", "bbox_xyxy_px": [1.5, 2.0, 11.5, 22.0], "score": 0.5}],
}
EMPTY = {"width": 10, "height": 10, "objects": []}
SOURCE = AnswerSource("0123", {"max_new_tokens": 512, "codec": "json", "sizes": (1, 2)})
A = Path("a")


def written(path: Path) -> list[str]:
    return [json.loads(line)["image"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_second_log_reads_what_the_first_wrote(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    answer = ANSWER | {"raw_text": "a line separator \u2028 within"}
    PredictionLog(path, A).add("größe.jpg", SOURCE, "ff", answer)
    again = PredictionLog(path, A)
    again.add("2.jpg", SOURCE, "ee", EMPTY)
    assert again.row("größe.jpg").items() >= answer.items()
    assert again.change("größe.jpg", SOURCE, "ff") == ""
    assert "3.jpg" not in again
    assert [row["image"] for row in read_rows(path)] == written(path) == ["größe.jpg", "2.jpg"]


@pytest.mark.parametrize(
    ("source", "picture", "reason"),
    [
        (replace(SOURCE, checkpoint="4567"), "ff", "checkpoint changed"),
        (SOURCE, "ee", "image changed"),
        (replace(SOURCE, settings=SOURCE.settings | {"codec": "tags"}), "ff", "settings changed: codec"),
        (replace(SOURCE, settings={"codec": "json", "find": 1}), "ff", "settings changed: find, max_new_tokens, sizes"),
        (replace(SOURCE, checkpoint="4567"), "ee", "checkpoint changed and image changed"),
    ],
)
def test_an_answer_is_valid_only_if_everything_that_determined_it_is_unchanged(
    tmp_path: Path, source: AnswerSource, picture: str, reason: str
) -> None:
    path = tmp_path / "out.jsonl"
    PredictionLog(path, A).add("1.jpg", SOURCE, "ff", ANSWER)
    assert PredictionLog(path, A).change("1.jpg", source, picture) == reason


def test_a_line_of_an_older_version_is_not_reused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps({"image": "1.jpg", "checkpoint": "a", **ANSWER}) + "\n")
    assert PredictionLog(path, A).change("1.jpg", SOURCE, "ff") == "an older version wrote no key"


def test_a_new_answer_replaces_only_the_old_one(tmp_path: Path) -> None:
    path, other = tmp_path / "out.jsonl", replace(SOURCE, checkpoint="4567")
    log = PredictionLog(path, A)
    for name in ("1.jpg", "2.jpg"):
        log.add(name, SOURCE, "ff", ANSWER)
    log.add("1.jpg", other, "ff", EMPTY)
    assert written(path) == ["1.jpg", "2.jpg", "1.jpg"]  # appended: at no time is a line missing
    assert [(row["image"], row["width"]) for row in read_rows(path)] == [("2.jpg", 100), ("1.jpg", 10)]
    PredictionLog(path, A).add("3.jpg", other, "ff", ANSWER)  # by another process, meanwhile
    assert log.close(other) == 1
    assert written(path) == ["2.jpg", "1.jpg", "3.jpg"]


def test_a_truncated_line_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    PredictionLog(path, A).add("1.jpg", SOURCE, "ff", ANSWER)
    with path.open("a") as out:
        out.write('{"image": "2.jpg", "chec')
    log = PredictionLog(path, A)
    assert "1.jpg" in log
    assert "2.jpg" not in log
    log.add("2.jpg", SOURCE, "ff", EMPTY)
    assert written(path) == ["1.jpg", "2.jpg"]


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    PredictionLog(path, A).add("1.jpg", SOURCE, "ff", ANSWER)
    assert "1.jpg" in PredictionLog(path, A.absolute())
    with pytest.raises(DataError, match=r"out\.jsonl: 1\.jpg was predicted by a, not by b"):
        PredictionLog(path, Path("b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello\n", r"notes\.txt:1: not valid JSON"),
        (b'{"image": 1, "checkpoint": "a"}\n', r"notes\.txt:1: image is 1 \(an integer\)"),
        (b"[]\n", r"notes\.txt:1: expected an object"),
        (b"\xff\xd8\n", r"notes\.txt:1: not UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        PredictionLog(path, A)
    assert path.read_bytes() == content


def test_pycocotools_reads_the_export(tmp_path: Path) -> None:
    rows = [{"image": "1.jpg", **ANSWER}, {"image": "2.jpg", **EMPTY}]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco_predictions(rows)))
    loaded = COCO(str(path))
    assert loaded.getImgIds() == [1, 2]
    (annotation,) = loaded.loadAnns(loaded.getAnnIds(imgIds=1, catIds=loaded.getCatIds(catNms=["cat"])))
    assert annotation["bbox"] == [1.5, 2.0, 10.0, 20.0]
    assert (annotation["area"], annotation["score"]) == (200.0, 0.5)
