"""Small, medium and large by the annotated area: from a COCO file through the product's own files, as pycocotools says.

The masks of the file cover 30 to 70 % of their boxes, so that by the boxes most objects would be in other bands.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coordexp.evaluation.coco import STAT_NAMES, coco_ap
from coordexp.evaluation.evaluator import Evaluation
from coordexp.evaluation.lvis import federated_of
from coordexp.evaluation.upper_bound import codec_upper_bound
from coordexp.packing.prepare import SamplePreparer, have_areas, write_split
from coordexp.packing.samples import SampleStore
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, read_results, write_results
from coordexp.records.manifest import READERS
from coordexp.records.schema import ObjectRecord, Record, read_records, write_records
from coordexp.records.sources.base import SplitFiles
from coordexp.rollout.decode import ground_truth
from coordexp.text.codecs import get_codec
from evaluation.builders import box, image, pred, run, table_of
from helpers import new_tokenizer, tiny_pixels
from records_folders import kept

CATEGORIES = [
    {"id": 3 * i + 1, "name": f"kind {i}", "frequency": "rcf"[i % 3]}
    for i in range(5)  # the last one is not annotated
]
WIDTH, HEIGHT = 640, 480
EDGES_PX2 = (32**2, 96**2)  # an area on an edge is in both bands


def annotation(rng: np.random.Generator, number: int, image_id: int, crowds: bool) -> dict[str, Any]:
    width, height = np.exp(rng.uniform(np.log(12), np.log(240), 2)).round(2)
    x, y = (rng.uniform(0, [WIDTH - width, HEIGHT - height])).round(2)
    area_px2 = width * height * rng.uniform(0.3, 0.7)
    edge_px2 = rng.choice(EDGES_PX2)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORIES[rng.integers(len(CATEGORIES) - 1)]["id"],
        "bbox": [float(v) for v in (x, y, width, height)],
        "area": int(edge_px2) if edge_px2 < width * height < 3 * edge_px2 else float(area_px2),
        "iscrowd": int(crowds and rng.random() < 0.15),
    }


def detections(rng: np.random.Generator, annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Near and exact ones, repeated and invented ones, with scores of four levels, so that most are tied."""
    rows = []
    for row in annotations:
        for _ in range(rng.integers(3)):
            near = np.array(row["bbox"]) + rng.normal(0, 0.08, 4) * row["bbox"][2] * (rng.random() < 0.9)
            rows.append({**row, "bbox": [float(v) for v in np.maximum(near.round(2), 1.0)]})
        if rng.random() < 0.3:
            rows.append(row | {"category_id": CATEGORIES[rng.integers(len(CATEGORIES))]["id"]})
    keys = ("image_id", "category_id", "bbox")
    return [{**{key: row[key] for key in keys}, "score": float(rng.integers(1, 5) / 4)} for row in rows]


def masks_and_results(crowds: bool = True) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO file with the labels of LVIS, and results."""
    rng = np.random.default_rng(7)
    images, annotations = [], []
    for image_id in range(1, 41):
        count = 0 if image_id % 7 == 0 else rng.integers(1, 12)
        rows = [annotation(rng, len(annotations) + i, image_id, crowds) for i in range(1, count + 1)]
        absent = {c["id"] for c in CATEGORIES} - {row["category_id"] for row in rows}
        labels = {
            "neg_category_ids": sorted(absent)[::2],
            "not_exhaustive_category_ids": [CATEGORIES[image_id % 5]["id"]],
        }
        name = f"{image_id}.jpg"
        annotations += rows
        images.append(
            {
                "id": image_id,
                "file_name": name,
                "coco_url": f"http://x/val2017/{name}",
                "width": WIDTH,
                "height": HEIGHT,
            }
            | labels
        )
    truth = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    return truth, detections(rng, annotations)


class FederatedEval(COCOeval):
    """lvis-api's rule for what pycocotools knows nothing of: a wrong detection of a name not annotated exhaustively."""

    def evaluateImg(self, imgId, catId, aRng, maxDet):
        found = super().evaluateImg(imgId, catId, aRng, maxDet)
        if found and catId in self.cocoGt.imgs[imgId]["not_exhaustive_category_ids"]:
            found["dtIgnore"] = found["dtIgnore"].astype(bool) | (found["dtMatches"] == 0)
        return found


def reference(
    truth: dict[str, Any], results: list[dict[str, Any]], evaluator_type: type[COCOeval] = COCOeval
) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluator = evaluator_type(coco, coco.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(STAT_NAMES, evaluator.stats.tolist(), strict=True))


def handed_over(folder: Path, source: str, truth: dict[str, Any], results: list[dict[str, Any]]) -> list[ImageResult]:
    """Annotations -> records -> samples -> gt_vs_pred, each by way of its file."""
    (folder / "truth.json").write_text(json.dumps(truth))
    reading = READERS[source](SplitFiles(folder, "truth.json", "", "val"))
    write_records(folder / "val.jsonl", kept(reading).records)
    preparer = SamplePreparer(new_tokenizer(), get_codec("json"), tiny_pixels())
    records = list(read_records(folder / "val.jsonl"))
    write_split(preparer, records, repeat("detect"), folder / "val.parquet", have_areas(records))
    names = {c["id"]: c["name"] for c in CATEGORIES}

    def predictions(image_id: int):
        for row in results:
            if row["image_id"] == image_id:
                x, y, width, height = row["bbox"]
                yield pred(names[row["category_id"]], (x, y, x + width, y + height), row["score"])

    lines = [
        image(s.image_id, ground_truth(s), list(predictions(s.image_id)), size=(s.width, s.height))
        for s in SampleStore(folder / "val.parquet")
    ]
    write_results(folder / "gt_vs_pred.jsonl", lines)
    return list(read_results(folder / "gt_vs_pred.jsonl"))


@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
def test_all_twelve_numbers_are_those_of_pycocotools_on_the_same_file(tmp_path: Path, backend: str) -> None:
    truth, results = masks_and_results()
    lines = handed_over(tmp_path, "coco", truth, results)
    categories = [Category(c["id"], c["name"]) for c in CATEGORIES]
    found = run(lines, categories).metrics["coco"] | coco_ap(table_of(lines, categories), backend).stats
    assert {name: found[name] for name in STAT_NAMES} == pytest.approx(reference(truth, results), abs=1e-9)
    assert found["n_gt_annotation_area"] == found["n_gt"] == sum(not a["iscrowd"] for a in truth["annotations"])


def test_the_numbers_of_lvis_by_size_are_those_of_its_own_rules(tmp_path: Path) -> None:
    """A detection counts only if its name is annotated or verified absent; a wrong one only where all are annotated."""
    truth, results = masks_and_results(crowds=False)
    lines = handed_over(tmp_path, "lvis", truth, results)
    categories = [Category(c["id"], c["name"], frequency=c["frequency"]) for c in CATEGORIES]
    labels = federated_of(list(read_records(tmp_path / "val.jsonl")), categories)
    assert labels is not None
    found = run(lines, categories, labels).metrics["lvis"]
    known = {(row["image_id"], row["category_id"]) for row in truth["annotations"]}
    known |= {(row["id"], category_id) for row in truth["images"] for category_id in row["neg_category_ids"]}
    judged = [row for row in results if (row["image_id"], row["category_id"]) in known]
    expected = reference(truth, judged, FederatedEval)
    assert len(judged) < len(results)
    assert expected["mAP"] > reference(truth, judged)["mAP"], "names that are not annotated exhaustively matter"
    shared = ("mAP", "AP50", "AP75", "APs", "APm", "APl")
    assert {name: found[name] for name in shared} == pytest.approx({name: expected[name] for name in shared}, abs=1e-9)
    assert found["AR300"] == pytest.approx(expected["AR100"], abs=1e-9), "no image has more than 100 of a name"


def in_bands(*areas_px2: float | None) -> Evaluation:
    """Objects of 40 x 40 px, which are medium by their box."""
    objects = [GroundTruth("cat", box(i, 0), area_px2=px2) for i, px2 in enumerate(areas_px2)]
    return run([image(1, objects, [pred("cat", box(0, 0))])])


def test_an_object_without_an_area_has_that_of_its_box() -> None:
    found = in_bands(900.0, None)
    assert found.metrics["coco"]["n_gt_annotation_area"] == 1
    assert (found.value("coco.ARs"), found.value("coco.ARm")) == (1.0, 0.0)
    assert in_bands(None, None).metrics["coco"]["n_gt_annotation_area"] == 0


def test_bands_of_coco_go_by_the_area_and_ours_by_the_box() -> None:
    details = in_bands(900.0, 1500.0).details
    assert [(row["area"], row["n_gt"]) for row in details["by_area"]] == [("small", 1), ("medium", 1)]
    assert [(row["side_px"], row["n_gt"]) for row in details["by_side_px"]] == [("32-64", 2)]
    objects = tuple(ObjectRecord("cat", box(i, 0), area_px2=px2) for i, px2 in enumerate((900.0, None)))
    upper_bound = codec_upper_bound([Record("1.jpg", 400, 400, objects)])
    assert [(row["size"], row["n"]) for row in upper_bound["by_area"]] == [("small", 1), ("medium", 1)]
    assert [(row["size"], row["n"]) for row in upper_bound["by_side_px"]] == [("32-64", 2)]
