"""Files of other detectors: COCO's own twelve numbers, the same numbers in every form, and named errors."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coordexp.errors import DataError
from coordexp.evaluation.coco import STAT_NAMES
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.foreign.answers import Family, read_answer
from coordexp.evaluation.foreign.predictions import Form, read_labels, read_predictions
from coordexp.evaluation.foreign.truth import Truth, read_truth
from coordexp.evaluation.protocol import STANDARD, STANDARD_MATCHING
from coordexp.records.gt_vs_pred import write_results

PARAMS = STANDARD.model_copy(update={"bootstrap_resamples": 50})
NAMES = {3: "cat", 17: "red mug", 90: "kite"}
Row = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """truth.json with masks smaller than boxes, crowds and empty images, and results.json of a middling detector."""
    rng = random.Random(11)
    images = [{"id": 7 * i, "file_name": f"val/{i}.jpg", "width": 640, "height": 480} for i in range(1, 41)]
    truth: list[Row] = []
    results: list[Row] = []
    for image in images[:-2]:
        for k in range(rng.randint(1, 6)):
            side = rng.choice([20, 40, 80, 160])
            x, y, label = rng.uniform(0, 640 - side), rng.uniform(0, 480 - side), rng.choice([3, 3, 17])
            row = {"id": len(truth) + 1, "image_id": image["id"], "category_id": label, "bbox": [x, y, side, side]}
            truth.append(row | {"area": rng.uniform(0.3, 1.0) * side * side, "iscrowd": int(k == 5)})
            for _ in range(rng.randint(0, 2)):
                d = rng.choice([0.03, 0.2]) * side
                found = [x + rng.uniform(-d, d), y + rng.uniform(-d, d), side, side * rng.uniform(0.8, 1.2)]
                named = label if rng.random() < 0.8 else 90
                results.append({"image_id": image["id"], "category_id": named, "bbox": found, "score": rng.random()})
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    instances = {"images": images, "annotations": truth, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(instances))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def metrics_of(truth: Truth, file: Path, form: Form | None = None) -> dict[str, Any]:
    read = read_predictions(file, truth, form)
    return evaluate(read.results, truth.categories, PARAMS, STANDARD_MATCHING, 1, truth.federated).metrics


def test_twelve_numbers_are_pycocotools(folder: Path) -> None:
    found = metrics_of(read_truth(folder / "truth.json"), folder / "results.json")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        official = COCOeval(truth, truth.loadRes(str(folder / "results.json")), "bbox")
        official.evaluate(), official.accumulate(), official.summarize()
    for name, value in zip(STAT_NAMES, official.stats.tolist(), strict=True):
        assert found["coco"][name] == pytest.approx(value, abs=1e-9), name
    assert found["known"] == found["held_out"] == {"mAP": None, "AP50": None}, "COCO does not say what is known"
    assert found["parse"]["parse_rate"] is None, "no text was parsed"


def as_lines(truth: Truth, results: list[Row], out: Path) -> None:
    rows: dict[int, list[Row]] = {image.image_id: [] for image in truth.images}
    for r in results:
        x, y, w, h = r["bbox"]
        box = [x, y, x + w, y + h]
        rows[r["image_id"]].append({"desc": NAMES[r["category_id"]], "bbox_xyxy_px": box, "score": r["score"]})
    with out.open("w") as lines:
        for image in truth.images:
            size = {"width": image.width, "height": image.height}
            lines.write(json.dumps({"image": f"/photos/{image.image}", **size, "objects": rows[image.image_id]}) + "\n")


def as_instances(truth: Truth, results: list[Row], out: Path) -> None:
    """As `predict --coco`: numbers of its own."""
    place = {image.image_id: number for number, image in enumerate(truth.images, 1)}
    images = [
        {"id": place[i.image_id], "file_name": i.image, "width": i.width, "height": i.height} for i in truth.images
    ]
    ids = {3: 2, 17: 1, 90: 3}
    rows = [r | {"image_id": place[r["image_id"]], "category_id": ids[r["category_id"]]} for r in results]
    names = [{"id": ids[number], "name": name} for number, name in NAMES.items()]
    out.write_text(json.dumps({"images": images, "annotations": rows, "categories": names}))


def as_csv(truth: Truth, results: list[Row], out: Path) -> None:
    with out.open("w", newline="") as text:
        rows = csv.writer(text)
        rows.writerow(["image_id", "class_name", "x_min", "y_min", "x_max", "y_max", "confidence"])
        for r in results:
            x, y, w, h = r["bbox"]
            rows.writerow([r["image_id"], NAMES[r["category_id"]], x, y, x + w, y + h, r["score"]])


def as_rows(truth: Truth, results: list[Row], out: Path) -> None:
    """As supervision's JSONSink."""
    names, files = ("x_min", "y_min", "x_max", "y_max"), {image.image_id: image.image for image in truth.images}
    rows = []
    for r in results:
        x, y, w, h = r["bbox"]
        about = {"class_id": 0, "confidence": r["score"], "tracker_id": "", "class_name": NAMES[r["category_id"]]}
        rows.append(dict(zip(names, (x, y, x + w, y + h), strict=True)) | about | {"image": files[r["image_id"]]})
    out.write_text(json.dumps(rows))


def as_yolo(truth: Truth, results: list[Row], out: Path) -> None:
    out.mkdir()
    stems = {image.image_id: Path(image.image).stem for image in truth.images}
    for image in truth.images:
        lines = []
        for r in results:
            if r["image_id"] == image.image_id:
                x, y, w, h = r["bbox"]
                where = [(x + w / 2) / 640, (y + h / 2) / 480, w / 640, h / 480]
                lines.append(" ".join(map(repr, [list(NAMES).index(r["category_id"]), *where, r["score"]])))
        (out / f"{stems[image.image_id]}.txt").write_text("\n".join(lines))


def as_gt_vs_pred(truth: Truth, results: list[Row], out: Path) -> None:
    source = out.with_name("results.json")
    write_results(out, read_predictions(source, truth).results)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (as_lines, "lines.jsonl"),
        (as_instances, "instances.json"),
        (as_csv, "rows.csv"),
        (as_rows, "rows.json"),
        (as_yolo, "labels"),
        (as_gt_vs_pred, "gt_vs_pred.jsonl"),
    ],
)
def test_every_form_gives_the_same_numbers(write: Callable[..., None], name: str, folder: Path) -> None:
    truth = read_truth(folder / "truth.json")
    results = json.loads((folder / "results.json").read_text())
    write(truth, results, folder / name)
    expected, found = metrics_of(truth, folder / "results.json"), metrics_of(truth, folder / name)
    assert found["coco"] == pytest.approx(expected["coco"], abs=1e-9)
    assert found["errors"] == pytest.approx(expected["errors"], abs=1e-9)
    assert found["f1"] == pytest.approx(expected["f1"], abs=1e-9)


def test_records_and_gt_vs_pred_serve_as_annotations(folder: Path) -> None:
    truth = read_truth(folder / "truth.json")
    as_gt_vs_pred(truth, [], folder / "gt_vs_pred.jsonl")
    assert read_truth(folder / "gt_vs_pred.jsonl").images == truth.images


ANSWERS: list[tuple[Family, str, list[tuple[str, list[float]]], Row]] = [
    ("qwen3-vl", '```json\n[{"bbox_2d": [100, 200, 500, 1000], "label": "cat"}]```', [("cat", [64, 96, 320, 480])], {}),
    ("qwen3-vl", '[{"bbox_2d": [100, 200, 500, 1000], "label": "cat"}, {"bbox_2d": [1', [("cat", [64, 96, 320, 480])],
     {"truncated": True}),
    ("qwen3-vl", '[{"bbox_2d": [5, 2, 1, 9], "label": "cat"}, {"label": "dog"}, {"bbox_2d": [0, 0, 1, 1]}]', [],
     {"dropped": {"bbox_invalid": 1, "wrong_arity": 1, "missing_desc": 1}}),
    ("qwen3-vl", "There are no cats.", [], {"container_found": False}),
    ("qwen3-vl", "[]", [], {}),
    ("qwen2.5-vl", '{"bbox_2d": [10, 20, 30.5, 40], "label": "cat"}', [("cat", [10, 20, 30.5, 40])], {}),
    ("gemini", '[{"box_2d": [200, 100, 1000, 500], "label": "cat"}]', [("cat", [64, 96, 320, 480])], {}),
    ("rex-omni", "<|object_ref_start|>cat<|object_ref_end|><|box_start|><100><200><500><900>,<0><0><10><10><|box_end|>",
     [("cat", [64, 96, 320, 432]), ("cat", [0, 0, 6.4, 4.8])], {}),
    ("rex-omni", "<|object_ref_start|>cat<|object_ref_end|><|box_start|><100><20", [], {"truncated": True}),
    ("rex-omni", "<|im_end|>", [], {}),
    ("rex-omni", "There is nothing.", [], {"container_found": False}),
    ("paligemma", "<eos>", [], {}),
    ("florence-2", "</s><s></s>", [], {}),
    ("paligemma", "<loc0256><loc0512><loc0512><loc1023> red mug ; <loc0000><loc0000><loc0001><loc0001> cat",
     [("red mug", [320, 120, 639.375, 240]), ("cat", [0, 0, 0.625, 0.46875])], {}),
    ("florence-2", "cat<loc_0><loc_0><loc_99><loc_199><loc_1><loc_1><loc_2><loc_2>red mug<loc_3><loc_3><loc_9><loc_9>",
     [("cat", [0.32, 0.24, 63.68, 95.76]), ("cat", [0.96, 0.72, 1.6, 1.2]), ("red mug", [2.24, 1.68, 6.08, 4.56])], {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "objects", "report"), ANSWERS)
def test_raw_answers_become_pixels(family: Family, text: str, objects: list, report: Row) -> None:
    answer = read_answer(text, family, 640, 480)
    assert [o.label for o in answer.objects] == [label for label, _ in objects]
    for found, (_, box) in zip(answer.objects, objects, strict=True):
        assert found.bbox_xyxy_px == pytest.approx(box, abs=1e-9)
    whole = {"container_found": True, "truncated": False, "dropped": {}} | report
    assert {key: getattr(answer.report, key) for key in whole} == whole


def test_raw_answers_are_evaluated_with_their_parse_statistics(folder: Path) -> None:
    truth, file = read_truth(folder / "truth.json"), folder / "answers.jsonl"
    rows = [
        {"image": "1.jpg", "answer": '[{"bbox_2d": [0, 0, 9, 9], "label": "cat"}]'},
        {"image": "2", "answer": "none"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_predictions(file, truth, "qwen3-vl")
    assert ["38 of 40" in note for note in read.notes] == [True, False]
    parse = metrics_of(truth, file, "qwen3-vl")["parse"]
    assert (parse["parse_rate"], parse["valid_objects"]) == (1 / 40, 1)


def test_labels_that_differ_are_mapped(folder: Path) -> None:
    truth, file, labels = read_truth(folder / "truth.json"), folder / "a.jsonl", folder / "labels.json"
    box = {"bbox_xyxy_px": [0, 0, 9, 9], "score": 0.5, "desc": "kitty"}
    file.write_text(json.dumps({"image": "1", "objects": [box]}))
    labels.write_text('{"kitty": "cat"}')
    results = read_predictions(file, truth, labels=read_labels(labels)).results
    assert [p.desc for r in results for p in r.pred] == ["cat"]


LINE = {"image": "1.jpg", "objects": [{"desc": "cat", "bbox_xyxy_px": [0, 0, 9, 9], "score": 0.5}]}
FAULTS = [
    ("x.json", [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5}], "count classes from 0"),
    ("x.json", [{"image_id": 8, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 0.5}], "image 8 is not in"),
    ("x.json", [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 9], "score": 0.5}], "bbox"),
    ("x.json", [{"image_id": 7, "category_id": 3, "bbox": [0, 0, -9, 9], "score": 0.5}], "x2 >= x1"),
    ("x.json", [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9]}], "none is invented"),
    ("x.json", [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9], "score": True}], "none is invented"),
    ("x.json", [{"image_id": 7, "category_id": [3], "bbox": [0, 0, 9, 9], "score": 1}], "category_id"),
    ("x.json", [7], "expected a detection"),
    ("x.json", "text", "expected COCO results"),
    ("x.jsonl", {**LINE, "width": 320, "height": 240}, "predicted on 320 x 240 px, annotated as 640 x 480"),
    ("x.jsonl", {**LINE, "image": "unknown.jpg"}, "'unknown.jpg' is not in"),
    ("x.jsonl", {**LINE, "objects": [7]}, "expected a list"),
    ("x.jsonl", {**LINE, "objects": [{"desc": 7, "bbox_xyxy_px": [0, 0, 9, 9], "score": 1}]}, "expected a text"),
    ("x.jsonl", {**LINE, "parse": {"what": 1}}, "expected the counters"),
    ("x.jsonl", {"hello": 1}, "For raw answers of a model, set --form"),
]


@pytest.mark.parametrize(("name", "value", "words"), FAULTS)
def test_invalid_predictions_are_reported(name: str, value: Any, words: str, folder: Path) -> None:
    file = folder / name
    file.write_text(json.dumps(value))
    with pytest.raises(DataError, match=words) as error:
        read_predictions(file, read_truth(folder / "truth.json"))
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": [], "annotations": []}, "no image"),
        ({"annotations": [{"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1]}]}, "image 9 is not in"),
        ({"annotations": [{"image_id": 7, "category_id": 4, "bbox": [0, 0, 1, 1]}]}, "category 4 is not in"),
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1], "iscrowd": "maybe"}]}, "iscrowd"),
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0, float("nan"), 1]}]}, "NaN is not a number"),
        ({"annotations": {}}, "found the keys"),
        ({"categories": [{"id": 3, "name": None}]}, "name is None"),
    ],
)
def test_invalid_annotations_are_reported(change: Row, words: str, folder: Path) -> None:
    source = json.loads((folder / "truth.json").read_text())
    (folder / "truth.json").write_text(json.dumps(source | change))
    with pytest.raises(DataError, match=words):
        read_truth(folder / "truth.json")
