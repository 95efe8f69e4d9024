from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from coordexp.config.loading import load_params
from coordexp.errors import DataError
from coordexp.evaluation.comparison import compare, most_changed_images
from coordexp.evaluation.evaluator import rounded
from coordexp.evaluation.protocol import STANDARD, STANDARD_MATCHING, STANDARD_SEED
from coordexp.evaluation.registry import metric_specs, view
from coordexp.records.gt_vs_pred import ParseReport
from evaluation.builders import FAST, box, image, perfect_zoo, pred, random_results, run, with_predictions


@pytest.mark.parametrize("changes", [{}, {"f1_ious": (0.4,), "duplicate_ious": (0.8, 0.99)}])
def test_metrics_are_exactly_the_registered_ones(changes):
    results, categories = random_results(0)
    metrics = run(results, categories, **changes).metrics
    specs = metric_specs(FAST.model_copy(update=changes))
    assert {f"{area}.{key}" for area, values in metrics.items() for key in values} == set(specs)


def test_metrics_can_be_written_as_strict_json():
    for results in (random_results(1)[0], [image(1, [], [])]):
        evaluation = run(results, random_results(1)[1])
        whole = [evaluation.metrics, evaluation.per_image, evaluation.pr_curve, evaluation.details]
        assert json.loads(json.dumps(whole, allow_nan=False)) == json.loads(json.dumps(whole))


def test_point_values_lie_inside_their_intervals():
    results, categories = random_results(2, n_images=60)
    evaluation = run(results, categories, bootstrap_resamples=200)
    for key, (low, high) in evaluation.metrics["interval"].items():
        assert low < evaluation.value(key) < high, key


def test_the_order_of_the_file_does_not_matter():
    results, categories = random_results(3, score_levels=3)
    forward, backward = run(results, categories), run(results[::-1], categories)
    assert forward.metrics == backward.metrics
    assert forward.per_image == backward.per_image


def test_per_image_counts_sum_to_the_totals():
    evaluation = run(*random_results(4))
    for key in ("tp_50", "fp_50", "fn_50"):
        assert sum(row[key] for row in evaluation.per_image) == evaluation.metrics["f1"][key]
    for key in ("n_gt", "n_pred"):
        assert sum(row[key] for row in evaluation.per_image) == evaluation.metrics["coco"][key]
    assert sum(row["n_unmapped"] for row in evaluation.per_image) == evaluation.metrics["input"]["names_unmapped"] > 0


def test_parse_counters_are_summed():
    answers = [
        ParseReport(container_found=True, n_valid=3),
        ParseReport(container_found=True, n_valid=1, dropped={"malformed": 2, "bbox_invalid": 1}),
        ParseReport(container_found=True, n_valid=0, dropped={"malformed": 1}, truncated=True),
        ParseReport(container_found=False, n_valid=0),
    ]
    results = [image(i, [], [pred("cat", box(0, 0))] * a.n_valid, parse=a) for i, a in enumerate(answers)]
    parse = run(results).metrics["parse"]
    assert (parse["parse_rate"], parse["truncated_rate"], parse["empty_rate"]) == (0.25, 0.25, 0.5)
    assert (parse["valid_objects"], parse["dropped_total"]) == (4, 4)
    assert (parse["dropped_malformed"], parse["dropped_bbox_invalid"], parse["dropped_missing_desc"]) == (3, 1, 0)


def test_an_evaluation_does_not_differ_from_itself():
    evaluation = run(*random_results(5))
    for key, row in compare(evaluation, evaluation).items():
        assert row == {"delta": 0, "lo": 0, "hi": 0, "p_superior": 0.5}, key


def test_better_predictions_get_the_verdict_better():
    results, categories = random_results(6, n_images=60)
    worse = run(results, categories)
    better = run([replace(r, pred=tuple(pred(g.desc, g.bbox_xyxy_px) for g in r.gt)) for r in results], categories)
    forward, backward = compare(better, worse), compare(worse, better)
    assert tuple(forward) == view("compared", FAST)
    for key in forward:
        assert forward[key]["delta"] == pytest.approx(better.value(key) - worse.value(key))
        assert 0 < forward[key]["lo"] < forward[key]["delta"] < forward[key]["hi"]
        assert (forward[key]["p_superior"], backward[key]["p_superior"]) == (1, 0)
        assert backward[key]["lo"] == pytest.approx(-forward[key]["hi"])


def test_the_images_that_changed_most_come_first():
    before = perfect_zoo(3)
    after = [before[0], replace(before[1], pred=()), replace(before[2], pred=before[2].pred[:1])]
    changed = most_changed_images(run(after), run(before), 2)
    assert [(row["image_id"], row["delta"]) for row in changed] == [(2, -1), (3, pytest.approx(-0.5))]


def test_comparison_needs_the_same_images_annotations_and_draws():
    base = run(perfect_zoo(3))
    with pytest.raises(DataError, match="different images: 1 ids"):
        compare(base, run(perfect_zoo(4)))
    relabelled = perfect_zoo(3)
    relabelled[0] = replace(relabelled[0], gt=relabelled[0].gt[:2])
    with pytest.raises(DataError, match="annotate the same images differently"):
        compare(base, run(relabelled))
    with pytest.raises(DataError, match="seed, resamples"):
        compare(base, run(perfect_zoo(3), seed=1))


def test_a_metric_undefined_on_one_side_is_not_compared():
    nothing = run([image(1, [], [])])
    assert compare(nothing, nothing)["coco.mAP"] is None
    assert compare(nothing, nothing)["f1.full_50"] is None


def test_pr_curve_is_flat_at_one_for_perfect_predictions():
    curve = run(perfect_zoo()).pr_curve
    assert curve["recall"][::50] == [0, 0.5, 1]
    assert curve["precision_50"] == curve["precision_75"] == pytest.approx([1] * 101)
    missed = run(with_predictions(perfect_zoo(), lambda p: [])).pr_curve
    assert missed["precision_50"] == [0] * 101


def test_rounding_reaches_every_float_and_nothing_else():
    value = {"a": 0.123456, "b": [0.00004, 7], "c": None, "d": "x", "e": {"f": True}}
    assert rounded(value) == {"a": 0.1235, "b": [0.0, 7], "c": None, "d": "x", "e": {"f": True}}


def test_the_standard_protocol_equals_params_yaml():
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    assert (params.eval, params.seed) == (STANDARD, STANDARD_SEED)
    # How near names are is not asked while lambda_sem is 0.
    assert STANDARD_MATCHING.lambda_sem == 0
    assert params.matching.model_copy(update={"semantic": STANDARD_MATCHING.semantic}) == STANDARD_MATCHING
