"""The evaluation of a run from its files, including LVIS labels that `convert` stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from coordexp.config.loading import load_params
from coordexp.config.paths import CHECKPOINTS, ProfilePaths
from coordexp.evaluation.suite import evaluate_run
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, write_results
from coordexp.records.schema import ObjectRecord, Record, write_records
from evaluation.builders import box, image, pred

NAMES = [Category(1, "cat", frequency="f"), Category(2, "dog", frequency="r")]


@pytest.fixture
def paths(tmp_path) -> ProfilePaths:
    """Two images: a cat that is found with a dog that nobody looked for, and one verified to hold no dog."""
    found = ProfilePaths("mine", tmp_path)
    results = [
        image(1, [("cat", box(0, 0))], [pred("cat", box(0, 0), 0.9), pred("dog", box(3, 3), 0.8)]),
        image(2, [], []),
    ]
    for name in CHECKPOINTS:
        found.evaluation(name).mkdir(parents=True)
        write_results(found.evaluation(name) / "gt_vs_pred.jsonl", results)
    found.records.mkdir(parents=True)
    return found


def write(paths: ProfilePaths, categories: list[Category], labelled: bool) -> None:
    (paths.records / "categories.json").write_text(json.dumps([c.to_json() for c in categories]))
    labels = [{"absent": [], "not_exhaustive": []}, {"absent": ["dog"], "not_exhaustive": []}] if labelled else [{}, {}]
    objects = [(ObjectRecord("cat", tuple(map(float, box(0, 0)))),), ()]
    records = [Record(f"{i}.jpg", 100, 100, objects[i - 1], metadata={"image_id": i, **labels[i - 1]}) for i in (1, 2)]
    write_records(paths.records / "val.jsonl", records)


@pytest.mark.parametrize("crowds", [False, True])
def test_val_without_a_counted_object_is_evaluated_and_scores_nothing(tmp_path, repository, crowds):
    paths = ProfilePaths("mine", tmp_path)
    region = {"metadata": {"iscrowd": 1}}
    objects = (ObjectRecord("cat", tuple(map(float, box(0, 0))), **region),) if crowds else ()
    write_records(paths.records / "val.jsonl", [Record("1.jpg", 400, 400, objects), Record("2.jpg", 400, 400, objects)])
    (paths.records / "categories.json").write_text(json.dumps([c.to_json() for c in NAMES]))
    gt = [GroundTruth("cat", tuple(map(float, box(0, 0))), iscrowd=True)] if crowds else []
    for name in CHECKPOINTS:
        paths.evaluation(name).mkdir(parents=True)
        preds = [pred("cat", box(3, 3))] if name == "stage2" else []
        write_results(paths.evaluation(name) / "gt_vs_pred.jsonl", [image(1, gt, preds), image(2, gt, [])])
    evaluate_run(load_params(repository / "params.yaml"), paths)
    metrics = json.loads(paths.metrics.read_text())
    areas = metrics["stage2"]["eval"]
    assert [areas["f1"][key] for key in ("full_50", "recall_50", "full_50_macro")] == [None] * 3
    assert (areas["f1"]["precision_50"], areas["f1"]["fp_50"]) == (0, 1)
    assert metrics["stage1"]["eval"]["f1"]["precision_50"] is None
    assert set(metrics["comparison"]["stage2_vs_control"].values()) == {None}
    headline = json.loads((paths.reports / "headline.json").read_text())
    assert headline["stage2"]["eval"]["f1"]["full_50"] is None
    assert "comparison" not in headline, "an undefined comparison leaves no row"
    assert json.loads((paths.run("eval") / "upper_bound.json").read_text())["mAP"] is None
    lines = paths.curve("pr").read_text().splitlines()
    assert (len(lines), lines[0], lines[1]) == (102, "recall\tprecision", "0.00\t")


def test_labels_of_lvis_reach_the_metrics(paths, repository):
    params = load_params(repository / "params.yaml")
    write(paths, NAMES, labelled=True)
    metrics = evaluate_run(params, paths)["stage2"]["eval"]
    assert metrics["lvis"]["APf"] == 1.0
    assert metrics["interval"]["lvis.mAP"] == [1.0, 1.0]
    assert json.loads(paths.metrics.read_text())["stage2"]["eval"]["lvis"] == metrics["lvis"]


@pytest.mark.parametrize("lacks", ["frequency", "labels"])
def test_other_data_sets_have_no_lvis_area(paths, repository, lacks):
    categories = [replace(c, frequency=None) for c in NAMES] if lacks == "frequency" else NAMES
    write(paths, categories, labelled=lacks == "frequency")
    assert "lvis" not in evaluate_run(load_params(repository / "params.yaml"), paths)["stage2"]["eval"]


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def test_headline_json_is_a_small_subset_of_the_metrics_under_the_same_keys(paths, repository) -> None:
    write(paths, NAMES, labelled=False)
    params = load_params(repository / "params.yaml")
    for ious in ([0.9, 0.95], [0.8, 0.9]):
        changed = params.model_copy(update={"eval": params.eval.model_copy(update={"duplicate_ious": ious})})
        everything = dict(leaves(evaluate_run(changed, paths)))
        chosen = dict(leaves(json.loads((paths.reports / "headline.json").read_text())))
        assert chosen.items() <= everything.items()
        assert len(chosen) == 3 * 4 + 3
        assert {path[0] for path in chosen} == {"stage1", "stage1-control", "stage2", "comparison"}
        assert ("stage2", "eval", "set", f"dup_pairs_{100 * ious[0]:.0f}") in chosen
