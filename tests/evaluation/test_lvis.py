"""LVIS rules by hand, and against an independent implementation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from coordexp.errors import DataError
from coordexp.evaluation.average_precision import mean_ap, overlapping_pairs, unweighted_ap
from coordexp.evaluation.foreign.truth import read_truth
from coordexp.evaluation.lvis import (
    FREQUENCIES,
    MAX_DETECTIONS,
    FederatedLabels,
    check_federated,
    federated_from,
    federated_of,
    frequency_rows,
    lvis_ap,
    match_federated,
)
from coordexp.evaluation.registry import metric_specs
from coordexp.records.categories import Category
from coordexp.records.schema import Record
from evaluation.builders import CAT, DOG, FAST, box, image, pred, random_results, run, table_of

HIT = pred("cat", box(0, 0), 0.5)
FALSE_DOG = pred("dog", box(3, 3), 0.9)  # no dog is annotated in the image
FALSE_CAT = pred("cat", box(3, 0), 0.9)


def labels(absent=(), not_exhaustive=(), image_ids=(1, 2)) -> FederatedLabels:
    return FederatedLabels(
        frequency={"cat": "r", "dog": "f"},
        absent={i: frozenset(absent) for i in image_ids},
        not_exhaustive={i: frozenset(not_exhaustive) for i in image_ids},
    )


def ap(results, federated: FederatedLabels) -> dict[str, float | None]:
    """The numbers of record, after checking that our own matches give the same."""
    table = table_of(results, [CAT, DOG])
    record = lvis_ap(table, federated)
    ap_KT = unweighted_ap(match_federated(table, federated, overlapping_pairs(table)), table.n_images)
    assert mean_ap(ap_KT) == pytest.approx(record["mAP"])
    return record


def scene(*preds) -> list:
    """One image with a cat and what is predicted in it; one with a dog, found exactly."""
    return [image(1, [("cat", box(0, 0))], preds), image(2, [("dog", box(0, 0))], [pred("dog", box(0, 0), 0.5)])]


def test_a_category_that_was_not_searched_does_not_count():
    assert ap(scene(HIT, FALSE_DOG), labels())["mAP"] == pytest.approx(1)


def test_a_category_verified_absent_is_a_false_positive():
    record = ap(scene(HIT, FALSE_DOG), labels(absent=["dog"]))
    assert record["APr"] == pytest.approx(1)
    assert record["APf"] == pytest.approx(0.5), "one false box ranks above the only dog"
    assert record["mAP"] == pytest.approx(0.75)
    assert record["APc"] is None, "no common category"


def test_an_unmatched_box_counts_unless_its_category_is_not_exhaustive():
    assert ap(scene(FALSE_CAT, HIT), labels())["APr"] == pytest.approx(0.5)
    assert ap(scene(FALSE_CAT, HIT), labels(not_exhaustive=["cat"]))["APr"] == pytest.approx(1)


@pytest.mark.parametrize(("n_before", "expected"), [(MAX_DETECTIONS - 1, 1), (MAX_DETECTIONS, 0)])
def test_the_limit_counts_every_detection_of_an_image(n_before: int, expected: float):
    """Dogs are not evaluated in the cat's image, yet 300 of them push the cat over the limit."""
    crowd_out = [replace(FALSE_DOG, score=0.9)] * n_before
    assert ap(scene(*crowd_out, HIT), labels())["APr"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(6))
def test_own_matches_agree_with_the_library(seed: int):
    results, categories = random_results(seed, n_images=25, score_levels=5 if seed % 2 else None)
    rng = np.random.default_rng(seed)
    names = [c.name for c in categories]

    def some(share: float) -> dict[int, frozenset[str]]:
        return {r.image_id: frozenset(n for n in names if rng.random() < share) for r in results}

    shown = {r.image_id: {g.desc for g in r.gt} for r in results}
    absent = {i: chosen - shown[i] for i, chosen in some(0.3).items()}
    frequency = {name: FREQUENCIES[k % 3] for k, name in enumerate(names)}
    federated = FederatedLabels(frequency=frequency, absent=absent, not_exhaustive=some(0.3))
    table = table_of(results, categories)
    record = lvis_ap(table, federated)
    ap_KT = unweighted_ap(match_federated(table, federated, overlapping_pairs(table)), table.n_images)
    rows = {"mAP": list(range(len(names))), **frequency_rows(table, federated)}
    for name, members in rows.items():
        assert mean_ap(ap_KT[members]) == pytest.approx(record[name], abs=1e-9), name
    assert mean_ap(ap_KT[:, :1]) == pytest.approx(record["AP50"], abs=1e-9)
    assert mean_ap(ap_KT[:, 5:6]) == pytest.approx(record["AP75"], abs=1e-9)


def test_the_area_exists_only_with_labels():
    with_labels = run(scene(HIT), [CAT, DOG], labels()).metrics
    assert {f"{a}.{k}" for a, values in with_labels.items() for k in values} == set(metric_specs(FAST, lvis=True))
    low, high = with_labels["interval"]["lvis.mAP"]
    assert low <= 1 <= high
    assert "lvis" not in run(scene(HIT), [CAT, DOG]).metrics


def test_images_and_categories_without_labels_are_refused():
    table = table_of(scene(HIT), [CAT, DOG])
    with pytest.raises(DataError, match="Image id 2 is not in the LVIS annotations"):
        check_federated(table, labels(image_ids=[1]))
    with pytest.raises(DataError, match="Category 'dog' is not in the LVIS annotations"):
        check_federated(table, replace(labels(), frequency={"cat": "r"}))


def test_labels_are_read_from_an_annotation_file(tmp_path):
    file = tmp_path / "lvis.json"
    source = {
        "categories": [{"id": 1, "name": "barn_owl", "frequency": "c"}],
        "images": [
            {"id": 7, "width": 4, "height": 4, "neg_category_ids": [1], "not_exhaustive_category_ids": []},
        ],
        "annotations": [],
    }
    file.write_text(json.dumps(source))
    read = read_truth(file)
    assert set(read.sizes_wh_px) == {7}
    assert read.federated is not None
    assert (read.federated.frequency, read.federated.absent, read.federated.not_exhaustive) == (
        {"barn owl": "c"},
        {7: frozenset({"barn owl"})},
        {7: frozenset()},
    )
    file.write_text(json.dumps({**source, "categories": [{"id": 1, "name": "cat"}]}))
    with pytest.raises(DataError, match="not an LVIS file"):
        read_truth(file)
    file.write_text(json.dumps({**source, "images": [{"id": 7, "width": 4, "height": 4}]}))
    assert read_truth(file).federated is None, "COCO has no such labels"


def test_labels_are_kept_in_records_and_categories():
    """What `convert` keeps of an LVIS file says the same as the file itself."""
    names = ({"id": 1, "name": "barn_owl", "frequency": "c"}, {"id": 2, "name": "cat", "frequency": "f"})
    image = {"id": 7, "neg_category_ids": [1], "not_exhaustive_category_ids": [2]}
    direct = federated_from({"categories": names, "images": [image]}, "lvis.json")
    categories = [Category(1, "barn owl", frequency="c"), Category(2, "cat", frequency="f")]
    metadata = {"image_id": 7, "absent": ["barn owl"], "not_exhaustive": ["cat"]}
    record = Record("7.jpg", 64, 48, (), metadata=metadata)
    assert federated_of([record], categories) == direct
    assert federated_of([replace(record, metadata={"image_id": 7})], categories) is None
    assert federated_of([record], [*categories, Category(3, "dog")]) is None
